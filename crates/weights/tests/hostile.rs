//! Files that lie: each is refused with an error that names the file, the tensor or field, what was expected and what
//! was found; none panics.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

use common::{Files, container, f32s, regions, safetensors};
use oxseek_tensor::ByteRegion;
use oxseek_weights::{Checkpoint, Error, HEADER_BYTES_MAX, ModelConfig, SafeTensors};
use serde_json::Value;

const SHARD: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A small valid configuration that uses every checked field.
const CONFIG: &str = r#"{
  "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 3,
  "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4,
  "qk_rope_head_dim": 4, "v_head_dim": 4, "intermediate_size": 16, "moe_intermediate_size": 8,
  "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
  "first_k_dense_replace": 1, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
  "norm_topk_prob": true, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "hidden_act": "silu",
  "attention_bias": false, "rope_theta": 10000, "max_position_embeddings": 4096, "num_nextn_predict_layers": 1,
  "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
  "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
  "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1
}"#;

/// How the files of a case are made and read.
enum Input {
    /// A safetensors header as it is, and so many bytes of data.
    Header(&'static str, usize),
    /// The bytes of a safetensors file.
    Bytes(fn() -> Vec<u8>),
    /// The valid configuration with the value at a JSON pointer replaced, or removed for an empty one.
    Config(&'static str, &'static str),
    /// The bytes of a config.json.
    ConfigBytes(fn() -> Vec<u8>),
    /// The bytes of a generation_config.json beside a valid configuration.
    Generation(&'static str),
    /// Files in memory.
    Memory(fn() -> Files),
    /// A valid folder and what is done to it.
    Folder(fn(&Path)),
    /// A checkpoint of these tensors and what is asked of it.
    Ask(fn() -> Vec<u8>, fn(&Checkpoint) -> Result<(), Error>),
}

struct Case {
    name: &'static str,
    input: Input,
    /// What the message has to contain.
    want: &'static [&'static str],
}

const fn header(name: &'static str, text: &'static str, data: usize, want: &'static [&'static str]) -> Case {
    Case { name, input: Input::Header(text, data), want }
}

const fn bytes(name: &'static str, make: fn() -> Vec<u8>, want: &'static [&'static str]) -> Case {
    Case { name, input: Input::Bytes(make), want }
}

const fn config(
    name: &'static str,
    at: &'static str,
    value: &'static str,
    want: &'static [&'static str],
) -> Case {
    Case { name, input: Input::Config(at, value), want }
}

const fn config_bytes(name: &'static str, make: fn() -> Vec<u8>, want: &'static [&'static str]) -> Case {
    Case { name, input: Input::ConfigBytes(make), want }
}

const fn generation(name: &'static str, text: &'static str, want: &'static [&'static str]) -> Case {
    Case { name, input: Input::Generation(text), want }
}

const fn memory(name: &'static str, make: fn() -> Files, want: &'static [&'static str]) -> Case {
    Case { name, input: Input::Memory(make), want }
}

const fn folder(name: &'static str, spoil: fn(&Path), want: &'static [&'static str]) -> Case {
    Case { name, input: Input::Folder(spoil), want }
}

const fn ask(
    name: &'static str,
    make: fn() -> Vec<u8>,
    what: fn(&Checkpoint) -> Result<(), Error>,
    want: &'static [&'static str],
) -> Case {
    Case { name, input: Input::Ask(make, what), want }
}

const CONTAINER_CASES: &[Case] = &[
    bytes("an empty file", Vec::new, &["truncated: 0 bytes", "at least 8"]),
    bytes("seven bytes", || vec![2, 0, 0, 0, 0, 0, 0], &["truncated: 7 bytes"]),
    bytes("a length and no header", || vec![2, 0, 0, 0, 0, 0, 0, 0], &["ends at byte 10", "the file at 8"]),
    bytes("a header of no bytes", || vec![0; 8], &["header is not a JSON object", "EOF"]),
    bytes("a header one byte longer than the file", || cut(header_end() - 1), &["the header ends at byte"]),
    bytes(
        "no data",
        || cut(header_end()),
        &["tensor m", "truncated: its data ends at byte 16", "the file has 0"],
    ),
    bytes("all but the last byte", || cut(valid().len() - 1), &["tensor v", "truncated", "the file has 21"]),
    bytes("a byte too many", || [valid(), vec![0]].concat(), &["1 bytes after the last tensor"]),
    bytes(
        "the largest length",
        || [0xff; 64].to_vec(),
        &["header of 18446744073709551615 bytes", "100000000"],
    ),
    bytes("a length with the sign bit", || length(1 << 63), &["header of 9223372036854775808 bytes"]),
    bytes(
        "a length over the limit",
        || length(HEADER_BYTES_MAX + 1),
        &["100000001 bytes, at most 100000000"],
    ),
    bytes("a length at the limit", || length(HEADER_BYTES_MAX), &["ends at byte 100000008, the file at 64"]),
    bytes("a zip file", || b"PK\x03\x04\x14\x00\x08\x08data.pkl".to_vec(), &["not a safetensors file?"]),
    bytes("a header that is no UTF-8", || container(b"{\"\xff\xfe\": 1}", b""), &["not UTF-8", "index 2"]),
    bytes("a header of NULs", || container(&[0; 16], b""), &["not a JSON object of tensors"]),
    bytes("deep nesting", || container(&[b'['; 50_000], b""), &["not a JSON object of tensors"]),
    bytes("deep nesting in metadata", || nested_header("__metadata__"), &["not a JSON object of tensors"]),
    bytes("deep nesting in a tensor", || nested_header("a"), &["tensor a", "expected an object"]),
    bytes("a million sizes", million_sizes, &["tensor a", "more than 8 dimensions"]),
    bytes("a name of a megabyte", long_name, &["tensor nnnn", "characters] ", "unknown dtype"]),
    header("not JSON", "{\"a\": ", 0, &["tensor a", "EOF"]),
    header("text after the object", "{} {}", 0, &["not a JSON object of tensors", "trailing characters"]),
    header("a list", "[]", 0, &["expected an object of tensors", "sequence"]),
    header("a number", "17", 0, &["expected an object of tensors", "`17`"]),
    header("null", "null", 0, &["expected an object of tensors"]),
    header("data and no tensors", "{}", 3, &["3 bytes after the last tensor"]),
    header("a tensor that is null", r#"{"a":null}"#, 0, &["tensor a", "expected an object"]),
    header(
        "a tensor as a list",
        r#"{"a":["U8",[2],[0,2]]}"#,
        2,
        &["tensor a", "expected an object", "sequence"],
    ),
    header("an unknown field", r#"{"a":{"dtype":"U8","x":1}}"#, 0, &["tensor a", "unknown field \"x\""]),
    header("no dtype", r#"{"a":{"shape":[2],"data_offsets":[0,2]}}"#, 2, &["tensor a", "dtype is missing"]),
    header("no shape", r#"{"a":{"dtype":"U8","data_offsets":[0,2]}}"#, 2, &["tensor a", "shape is missing"]),
    header("no offsets", r#"{"a":{"dtype":"U8","shape":[2]}}"#, 2, &["tensor a", "data_offsets is missing"]),
    header(
        "a tensor twice",
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
        2,
        &["tensor a", "twice"],
    ),
    header(
        "a field twice",
        r#"{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}"#,
        1,
        &["tensor a", "\"dtype\" occurs twice"],
    ),
    header(
        "an unknown dtype",
        r#"{"a":{"dtype":"F9","shape":[1],"data_offsets":[0,1]}}"#,
        1,
        &["tensor a", "unknown dtype \"F9\"", "expected one of F64, F32"],
    ),
    header(
        "a lower-case dtype",
        r#"{"a":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}}"#,
        4,
        &["\"f32\""],
    ),
    header(
        "a dtype number",
        r#"{"a":{"dtype":1,"shape":[1],"data_offsets":[0,4]}}"#,
        4,
        &["tensor a", "`1`"],
    ),
    header(
        "a negative size",
        r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#,
        1,
        &["tensor a", "`-1`"],
    ),
    header(
        "a size of 1.5",
        r#"{"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}}"#,
        1,
        &["tensor a", "`1.5`"],
    ),
    header(
        "a size as text",
        r#"{"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}}"#,
        1,
        &["tensor a", "\"1\""],
    ),
    header(
        "a shape number",
        r#"{"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}}"#,
        1,
        &["a list of sizes"],
    ),
    header(
        "a size above 64 bits",
        r#"{"a":{"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1]}}"#,
        1,
        &["tensor a", "u64"],
    ),
    header(
        "sizes whose product overflows",
        r#"{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
        0,
        &["tensor a", "shape [4294967296, 4294967296] overflows"],
    ),
    header(
        "a size whose bytes overflow",
        r#"{"a":{"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]}}"#,
        0,
        &["tensor a", "overflows"],
    ),
    header(
        "too many dimensions",
        r#"{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}"#,
        1,
        &["tensor a", "more than 8 dimensions"],
    ),
    header(
        "too few bytes for the shape",
        r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,23]}}"#,
        23,
        &["tensor a", "F32 of shape [2, 3] takes 24 bytes, data_offsets hold 23"],
    ),
    header(
        "too many bytes for the shape",
        r#"{"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,24]}}"#,
        24,
        &["tensor a", "BF16 of shape [2, 3] takes 12 bytes, data_offsets hold 24"],
    ),
    header(
        "no bytes for a shape",
        r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,0]}}"#,
        0,
        &["tensor a", "takes 4 bytes, data_offsets hold 0"],
    ),
    header(
        "offsets that run backwards",
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,0]}}"#,
        2,
        &["tensor a", "data_offsets [2, 0] run backwards"],
    ),
    header(
        "offsets past the end",
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
        2,
        &["tensor a", "ends at byte 3 of the data, the file has 2"],
    ),
    header(
        "the largest offsets",
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615]}}"#,
        2,
        &["tensor a", "ends at byte 18446744073709551615", "the file has 2"],
    ),
    header(
        "a negative offset",
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[-1,1]}}"#,
        2,
        &["tensor a", "`-1`"],
    ),
    header(
        "one offset",
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0]}}"#,
        2,
        &["tensor a", "length 1"],
    ),
    header("three offsets", r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1,2]}}"#, 2, &["tensor a"]),
    header(
        "tensors that overlap",
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
        3,
        &["tensor b", "overlaps the tensor before it", "expected"],
    ),
    header(
        "tensors that share all bytes",
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#,
        2,
        &["tensor b", "overlaps"],
    ),
    header(
        "an empty tensor inside another",
        r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}"#,
        2,
        &["tensor b", "overlaps"],
    ),
    header(
        "a hole between tensors",
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}"#,
        3,
        &["tensor b", "leaves a gap before it"],
    ),
    header(
        "a hole before the first",
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
        2,
        &["tensor a", "leaves a gap"],
    ),
    header(
        "a name with an escape sequence",
        "{\"\\u001b[2Jx\\u202e\":{\"dtype\":\"F9\",\"shape\":[],\"data_offsets\":[0,0]}}",
        0,
        &["tensor \\u{1b}[2Jx\\u{202e}: unknown dtype"],
    ),
];

const FOLDER_CASES: &[Case] = &[
    folder("a folder that is not there", |p| fs::remove_dir_all(p).unwrap(), &["oxseek-hostile"]),
    folder("no config.json", |p| remove(p, "config.json"), &["oxseek-hostile", "no config.json"]),
    folder("an empty config.json", |p| write(p, "config.json", b""), &["config.json", "not JSON", "EOF"]),
    folder("config.json is a folder", |p| mkdir(p, "config.json"), &["config.json", "not a regular file"]),
    folder("no weights", |p| remove(p, SHARD), &["no model.safetensors and no model.safetensors.index.json"]),
    folder("empty weights", |p| write(p, SHARD, b""), &[SHARD, "the file is empty"]),
    folder("weights are a folder", |p| mkdir(p, SHARD), &[SHARD, "not a regular file"]),
    folder(
        "pickled weights",
        |p| rename(p, SHARD, "pytorch_model.bin"),
        &["pytorch_model.bin", "never loaded"],
    ),
    folder(
        "safetensors called GGUF",
        |p| rename(p, SHARD, "model.gguf"),
        &["model.gguf", "expected \"GGUF\""],
    ),
    folder("shards and no index", two_shards, &["2 .safetensors files", "no model.safetensors.index.json"]),
    folder("an index that is no JSON", |p| write(p, INDEX, b"\x80\x02"), &[INDEX, "expected a JSON object"]),
    folder("an index that is a list", |p| index(p, r#"[{"a": "b.safetensors"}]"#), &[INDEX, "a JSON object"]),
    folder("an index without map", |p| index(p, "{}"), &[INDEX, "missing field `weight_map`"]),
    folder("an empty index", |p| index(p, r#"{"weight_map":{}}"#), &[INDEX, "weight_map is empty"]),
    folder("a map that is a list", |p| index(p, r#"{"weight_map":["m"]}"#), &[INDEX, "expected an object"]),
    folder("a file as a number", |p| index(p, r#"{"weight_map":{"m":1}}"#), &[INDEX, "`1`", "a string"]),
    folder(
        "a tensor twice in the index",
        |p| index(p, r#"{"weight_map":{"m":"model.safetensors","m":"other.safetensors"}}"#),
        &[INDEX, "\"m\" occurs twice"],
    ),
    folder(
        "two maps",
        |p| index(p, r#"{"weight_map":{"m":"model.safetensors"},"weight_map":{}}"#),
        &[INDEX, "duplicate field `weight_map`"],
    ),
    folder("the folder above", |p| map_to(p, "../x.safetensors"), &[INDEX, "tensor m", "../x.safetensors"]),
    folder(
        "an absolute path",
        |p| map_to(p, "/etc/x.safetensors"),
        &[INDEX, "tensor m", "/etc/x.safetensors"],
    ),
    folder("a folder below", |p| map_to(p, "sub/x.safetensors"), &[INDEX, "tensor m", "not the plain name"]),
    folder(
        "a Windows path",
        |p| map_to(p, "..\\\\x.safetensors"),
        &[INDEX, "tensor m", "not the plain name"],
    ),
    folder("the folder itself", |p| map_to(p, "."), &[INDEX, "tensor m", "not the plain name"]),
    folder("no name", |p| map_to(p, ""), &[INDEX, "tensor m", "not the plain name"]),
    folder("only an extension", |p| map_to(p, ".safetensors"), &[INDEX, "tensor m", "not the plain name"]),
    folder("another kind of file", |p| map_to(p, "x.bin"), &[INDEX, "tensor m", "x.bin"]),
    folder(
        "a NUL in the name",
        |p| map_to(p, "x\\u0000.safetensors"),
        &["x\\u{0}.safetensors", "is missing"],
    ),
    folder("a shard that is missing", |p| map_to(p, "x.safetensors"), &["x.safetensors is missing", INDEX]),
    folder(
        "a tensor that is not in its shard",
        |p| index(p, r#"{"weight_map":{"m":"model.safetensors","gone":"model.safetensors"}}"#),
        &[SHARD, "tensor gone", INDEX, "but it is not"],
    ),
    folder(
        "a tensor that is in another shard",
        wrong_shard,
        &["b.safetensors", "tensor m", "found it in a.saf"],
    ),
    folder("a tensor in two shards", same_tensor, &["b.safetensors", "tensor m", "is in a.safetensors too"]),
    memory("no files", Vec::new, &["model.safetensors", "missing"]),
    memory("a configuration and no weights", || vec![file("config.json", CONFIG)], &[SHARD, "missing"]),
    memory("weights and no configuration", || vec![(SHARD.into(), valid())], &["config.json", "missing"]),
    memory(
        "two configurations",
        || vec![file("config.json", CONFIG), file("config.json", "{}"), (SHARD.into(), valid())],
        &["config.json", "given twice"],
    ),
    memory(
        "weights twice",
        || vec![file("config.json", CONFIG), (SHARD.into(), valid()), (SHARD.into(), safetensors(&[]))],
        &[SHARD, "given twice"],
    ),
    memory(
        "an index of a shard that was not given",
        || with_index(r#"{"weight_map":{"m":"x.safetensors"}}"#),
        &["x.safetensors", "tensor m", "found it in model.safetensors"],
    ),
    memory(
        "an index of a tensor and shard that were not given",
        || with_index(r#"{"weight_map":{"q":"x.safetensors"}}"#),
        &["x.safetensors", "tensor q", "the file is missing"],
    ),
    memory("a huge index", huge_index, &[INDEX, "bytes, at most 67108864 allowed"]),
];

const TENSOR_CASES: &[Case] = &[
    ask(
        "a missing matrix",
        valid,
        |c| c.matrix("x", 2, 2).map(drop),
        &[SHARD, "tensor x", "missing", "[2, 2]"],
    ),
    ask("a missing vector", valid, |c| c.vector("x", 3).map(drop), &[SHARD, "tensor x", "missing", "[3]"]),
    ask(
        "a matrix transposed",
        || safetensors(&[("w", "F32", &[2, 3], &[0; 24])]),
        |c| c.matrix("w", 3, 2).map(drop),
        &[SHARD, "tensor w", "expected shape [3, 2], found [2, 3]"],
    ),
    ask("a matrix as vector", valid, |c| c.vector("m", 4).map(drop), &["tensor m", "[4], found [2, 2]"]),
    ask("a vector as matrix", valid, |c| c.matrix("v", 1, 3).map(drop), &["tensor v", "[1, 3], found [3]"]),
    ask(
        "a vector too long",
        valid,
        |c| c.vector("v", 2).map(drop),
        &["tensor v", "expected shape [2], found [3]"],
    ),
    ask(
        "the largest sizes",
        valid,
        |c| c.matrix("m", usize::MAX, usize::MAX).map(drop),
        &["tensor m", "expected shape", "found [2, 2]"],
    ),
    ask(
        "a matrix of integers",
        || safetensors(&[("w", "I32", &[2, 2], &[0; 16])]),
        |c| c.matrix("w", 2, 2).map(drop),
        &[SHARD, "tensor w", "expected F32, F16, BF16 or F8_E4M3, found I32"],
    ),
    ask(
        "a matrix of the other FP8",
        || safetensors(&[("w", "F8_E5M2", &[2, 2], &[0; 4])]),
        |c| c.matrix("w", 2, 2).map(drop),
        &["tensor w", "found F8_E5M2"],
    ),
    ask(
        "a vector of integers",
        || safetensors(&[("w", "I64", &[1], &[0; 8])]),
        |c| c.vector("w", 1).map(drop),
        &["tensor w", "expected F32, F16 or BF16, found I64"],
    ),
    ask(
        "a vector with a NaN",
        || safetensors(&[("w", "F32", &[3], &f32s(&[0.0, f32::NAN, 1.0]))]),
        |c| c.vector("w", 3).map(drop),
        &["tensor w", "value 1 is NaN", "finite"],
    ),
    ask(
        "a vector with an infinity",
        || safetensors(&[("w", "F16", &[2], &[0, 0, 0, 0xfc])]),
        |c| c.vector("w", 2).map(drop),
        &["tensor w", "value 1 is -inf", "finite"],
    ),
    ask(
        "FP8 without scales",
        || safetensors(&[("w", "F8_E4M3", &[2, 2], &[0; 4])]),
        |c| c.matrix("w", 2, 2).map(drop),
        &[SHARD, "tensor w_scale_inv", "is missing", "[1, 1]"],
    ),
    ask(
        "scales of another grid",
        || fp8("F32", &[1, 1], &f32s(&[1.0])),
        |c| c.matrix("w", 129, 1).map(drop),
        &[SHARD, "tensor w_scale_inv", "expected shape [2, 1], found [1, 1]"],
    ),
    ask(
        "one scale for the whole tensor",
        || fp8("F32", &[], &f32s(&[1.0])),
        |c| c.matrix("w", 129, 1).map(drop),
        &["tensor w_scale_inv", "expected shape [2, 1], found []"],
    ),
    ask(
        "scales of integers",
        || fp8("I32", &[2, 1], &[0; 8]),
        |c| c.matrix("w", 129, 1).map(drop),
        &["tensor w_scale_inv", "expected F32, F16, BF16, F8_E8M0 or U8, found I32"],
    ),
    ask(
        "a scale that is NaN",
        || fp8("F32", &[2, 1], &f32s(&[1.0, f32::NAN])),
        |c| c.matrix("w", 129, 1).map(drop),
        &["tensor w_scale_inv", "scale 1 is NaN"],
    ),
    ask(
        "a scale that is infinite",
        || fp8("BF16", &[2, 1], &[0x80, 0x7f, 0x80, 0x3f]),
        |c| c.matrix("w", 129, 1).map(drop),
        &["tensor w_scale_inv", "scale 0 is inf"],
    ),
    ask(
        "a UE8M0 scale that is NaN",
        || fp8("F8_E8M0", &[2, 1], &[127, 255]),
        |c| c.matrix("w", 129, 1).map(drop),
        &["tensor w_scale_inv", "scale 1 is NaN"],
    ),
];

const CONFIG_CASES: &[Case] = &[
    config_bytes("empty", Vec::new, &["not JSON", "EOF"]),
    config_bytes("not UTF-8", || b"{\"model_type\": \"\xff\"}".to_vec(), &["not JSON", "column"]),
    config_bytes("a list", || b"[1]".to_vec(), &["expected a JSON object, found [1]"]),
    config_bytes("text", || b"\"deepseek_v3\"".to_vec(), &["expected a JSON object", "deepseek_v3"]),
    config_bytes("an empty object", || b"{}".to_vec(), &["model_type", "found none", "deepseek_v3"]),
    config_bytes("two objects", || [CONFIG, CONFIG].concat().into_bytes(), &["not JSON", "trailing"]),
    config_bytes("deep lists", || vec![b'['; 1 << 20], &["not JSON", "recursion limit"]),
    config_bytes("deep objects", || b"{\"a\":".repeat(1 << 18), &["not JSON", "recursion limit"]),
    config_bytes("huge", || [&[b' '; 4 << 20], CONFIG.as_bytes()].concat(), &["at most 4194304 allowed"]),
    config_bytes(
        "a field twice",
        || twice("\"hidden_size\": 8"),
        &["not JSON", "\"hidden_size\" occurs twice"],
    ),
    config_bytes("a nested field twice", || twice("\"factor\": 40"), &["\"factor\" occurs twice"]),
    config_bytes("a number out of range", || swap("10000,", "1e999,"), &["not JSON", "number out of range"]),
    config_bytes("NaN", || swap("10000,", "NaN,"), &["not JSON", "column"]),
    config_bytes("wide shared experts", wide_shared_experts, &["n_shared_experts", "at most 67108864"]),
    config_bytes("wide heads", wide_heads, &["num_attention_heads", "8589934592 values, at most 67108864"]),
    config("an unknown model", "/model_type", "\"llama\"", &["model_type", "llama", "deepseek_v3"]),
    config("a model number", "/model_type", "3", &["model_type", "expected text, found 3"]),
    config(
        "a model with control characters",
        "/model_type",
        "\"\\u0007\\n\"",
        &["model_type", "found \\u{7}\\u{a}"],
    ),
    config("no vocab_size", "/vocab_size", "", &["vocab_size", "missing"]),
    config("no hidden_size", "/hidden_size", "", &["hidden_size", "missing"]),
    config("no layers", "/num_hidden_layers", "", &["num_hidden_layers", "missing"]),
    config("no heads", "/num_attention_heads", "", &["num_attention_heads", "missing"]),
    config("no kv_lora_rank", "/kv_lora_rank", "null", &["kv_lora_rank", "missing"]),
    config("no nope", "/qk_nope_head_dim", "", &["qk_nope_head_dim", "missing"]),
    config("no rope", "/qk_rope_head_dim", "", &["qk_rope_head_dim", "missing"]),
    config("no value", "/v_head_dim", "", &["v_head_dim", "missing"]),
    config("no intermediate_size", "/intermediate_size", "", &["intermediate_size", "missing"]),
    config("no positions", "/max_position_embeddings", "", &["max_position_embeddings", "missing"]),
    config("hidden_size 0", "/hidden_size", "0", &["hidden_size", "expected a whole number 1 to", "found 0"]),
    config("layers 0", "/num_hidden_layers", "0", &["num_hidden_layers", "1 to 1024, found 0"]),
    config("heads 0", "/num_attention_heads", "0", &["num_attention_heads", "found 0"]),
    config("positions 0", "/max_position_embeddings", "0", &["max_position_embeddings", "found 0"]),
    config("frequency 0", "/moe_layer_freq", "0", &["moe_layer_freq", "found 0"]),
    config(
        "largest layers",
        "/num_hidden_layers",
        "18446744073709551615",
        &["num_hidden_layers", "1 to 1024"],
    ),
    config(
        "largest hidden_size",
        "/hidden_size",
        "9223372036854775808",
        &["hidden_size", "16777216, found 92233"],
    ),
    config("more than 64 bits", "/hidden_size", "99999999999999999999", &["hidden_size", "whole number"]),
    config("largest experts", "/n_routed_experts", "4294967296", &["n_routed_experts", "0 to 4096"]),
    config("largest positions", "/max_position_embeddings", "268435457", &["max_position_embeddings"]),
    config("wide values", "/v_head_dim", "65537", &["v_head_dim", "1 to 65536, found 65537"]),
    config("text for a size", "/hidden_size", "\"8\"", &["hidden_size", "whole number", "found \"8\""]),
    config("a negative size", "/kv_lora_rank", "-4", &["kv_lora_rank", "found -4"]),
    config("a fraction", "/num_hidden_layers", "3.5", &["num_hidden_layers", "found 3.5"]),
    config("a float", "/num_hidden_layers", "3.0", &["num_hidden_layers", "found 3.0"]),
    config("a list for a size", "/vocab_size", "[64]", &["vocab_size", "found [64]"]),
    config("true for a size", "/vocab_size", "true", &["vocab_size", "found true"]),
    config("a negative q_lora_rank", "/q_lora_rank", "-1", &["q_lora_rank", "0 to 16777216, found -1"]),
    config("text for q_lora_rank", "/q_lora_rank", "\"none\"", &["q_lora_rank", "found \"none\""]),
    config("an odd rope", "/qk_rope_head_dim", "5", &["qk_rope_head_dim", "found 5", "even"]),
    config("rope 0", "/qk_rope_head_dim", "0", &["qk_rope_head_dim", "2 to 65536, found 0"]),
    config("grouped heads", "/num_key_value_heads", "1", &["num_key_value_heads", "2", "found 1"]),
    config("another qk_head_dim", "/qk_head_dim", "9", &["qk_head_dim", "expected 8", "found 9"]),
    config(
        "no moe_intermediate_size",
        "/moe_intermediate_size",
        "",
        &["moe_intermediate_size", "missing or 0"],
    ),
    config("no experts per token", "/num_experts_per_tok", "0", &["num_experts_per_tok", "missing or 0"]),
    config("MTP and no experts", "/n_routed_experts", "0", &["n_routed_experts", "MTP"]),
    config(
        "too many experts per token",
        "/num_experts_per_tok",
        "5",
        &["num_experts_per_tok", "4 exp", "found 5"],
    ),
    config("groups that do not divide", "/n_group", "3", &["n_group", "3 groups do not divide 8 experts"]),
    config("groups of one", "/n_group", "8", &["n_group", "8 groups of one expert"]),
    config("more groups kept than are", "/topk_group", "5", &["topk_group", "at most n_group, 4, found 5"]),
    config("no groups kept", "/topk_group", "0", &["topk_group", "missing or 0", "4 groups"]),
    config("groups kept unknown", "/topk_group", "", &["topk_group", "missing or 0", "4 groups"]),
    config(
        "wide experts",
        "/moe_intermediate_size",
        "16777217",
        &["moe_intermediate_size", "found 16777217"],
    ),
    config("an unknown scoring_func", "/scoring_func", "\"relu\"", &["scoring_func", "relu", "sigmoid"]),
    config("an unknown topk_method", "/topk_method", "\"random\"", &["topk_method", "random", "noaux_tc"]),
    config("a topk_method number", "/topk_method", "1", &["topk_method", "expected text, found 1"]),
    config(
        "text for a flag",
        "/norm_topk_prob",
        "\"yes\"",
        &["norm_topk_prob", "true or false, found \"yes\""],
    ),
    config("a number for a flag", "/attention_bias", "0", &["attention_bias", "true or false, found 0"]),
    config("a bias", "/attention_bias", "true", &["attention_bias", "found true"]),
    config("an unknown activation", "/hidden_act", "\"gelu\"", &["hidden_act", "found gelu", "silu"]),
    config("sparse attention", "/index_topk", "2048", &["index_topk", "not supported"]),
    config("no scaling at all", "/routed_scaling_factor", "0", &["routed_scaling_factor", "1e-6", "found 0"]),
    config(
        "a scaling that is 0 as F32",
        "/routed_scaling_factor",
        "1e-300",
        &["routed_scaling_factor", "1e-300"],
    ),
    config(
        "an epsilon of 0",
        "/rms_norm_eps",
        "0",
        &["rms_norm_eps", "expected a number 1e-30 to 1.0, found 0"],
    ),
    config("a negative epsilon", "/rms_norm_eps", "-1e-6", &["rms_norm_eps", "found -1e-6"]),
    config("text for an epsilon", "/rms_norm_eps", "\"1e-6\"", &["rms_norm_eps", "found \"1e-6\""]),
    config("a rope_theta of 1", "/rope_theta", "1", &["rope_theta", "expected a number 1.0001", "found 1"]),
    config(
        "layer types too few",
        "/mlp_layer_types",
        "[\"dense\"]",
        &["mlp_layer_types", "3, entries, found 1"],
    ),
    config("an unknown layer type", "/mlp_layer_types", "[\"x\"]", &["mlp_layer_types", "found \"x\""]),
    config("layer types as text", "/mlp_layer_types", "\"dense\"", &["mlp_layer_types", "expected a list"]),
    config(
        "MTP layers",
        "/num_nextn_predict_layers",
        "65",
        &["num_nextn_predict_layers", "0 to 64, found 65"],
    ),
    config(
        "rope_scaling as a list",
        "/rope_scaling",
        "[]",
        &["rope_scaling", "expected an object, found []"],
    ),
    config(
        "an unknown rope",
        "/rope_scaling/type",
        "\"ntk\"",
        &["rope_scaling.rope_type", "found ntk", "yarn"],
    ),
    config("a rope number", "/rope_scaling/type", "1", &["rope_scaling.type", "expected text, found 1"]),
    config(
        "two ropes",
        "/rope_scaling/rope_type",
        "\"default\"",
        &["rope_scaling.rope_type", "type says yarn"],
    ),
    config("no factor", "/rope_scaling/factor", "", &["rope_scaling.factor", "missing"]),
    config("a factor of 0", "/rope_scaling/factor", "0", &["rope_scaling.factor", "found 0"]),
    config("a negative beta", "/rope_scaling/beta_fast", "-1", &["rope_scaling.beta_fast", "found -1"]),
    config("text for mscale", "/rope_scaling/mscale", "\"1\"", &["rope_scaling.mscale", "found \"1\""]),
    config(
        "no original positions",
        "/rope_scaling/original_max_position_embeddings",
        "",
        &["rope_scaling.original_max_position_embeddings", "missing"],
    ),
    config(
        "an unknown quantisation",
        "/quantization_config/quant_method",
        "\"gptq\"",
        &["quantization_config.quant_method", "found gptq", "fp8"],
    ),
    config(
        "a nameless quantisation",
        "/quantization_config",
        "{\"bits\": 4}",
        &["quant_method", "missing", "fp8"],
    ),
    config("another FP8", "/quantization_config/fmt", "\"e5m2\"", &["quantization_config.fmt", "found e5m2"]),
    config(
        "other blocks",
        "/quantization_config/weight_block_size",
        "[64, 64]",
        &["quantization_config.weight_block_size", "found [64,64]", "[128, 128]"],
    ),
    config("quantisation as text", "/quantization_config", "\"fp8\"", &["quantization_config", "an object"]),
    config(
        "an end outside of the vocabulary",
        "/eos_token_id",
        "64",
        &["eos_token_id", "below 64, found 64"],
    ),
    config("one end of many", "/eos_token_id", "[1, 2, -1]", &["eos_token_id", "below 64, found -1"]),
    config("text for a token", "/bos_token_id", "\"<s>\"", &["bos_token_id", "found \"<s>\""]),
    generation("generation: empty", "", &["not JSON"]),
    generation("generation: a list", "[]", &["expected a JSON object, found []"]),
    generation("generation: an end twice", r#"{"eos_token_id":1,"eos_token_id":2}"#, &["occurs twice"]),
    generation(
        "generation: a far end",
        r#"{"eos_token_id":[1,99]}"#,
        &["eos_token_id", "below 64, found 99"],
    ),
    generation("generation: an object", r#"{"eos_token_id":{}}"#, &["eos_token_id", "found {}"]),
];

#[test]
fn hostile_containers_are_refused() {
    check(CONTAINER_CASES);
}

#[test]
fn hostile_folders_are_refused() {
    check(FOLDER_CASES);
}

#[test]
fn hostile_tensors_are_refused() {
    check(TENSOR_CASES);
}

#[test]
fn hostile_configurations_are_refused() {
    check(CONFIG_CASES);
}

/// Runs every case and fails with all that went wrong, not only the first.
fn check(cases: &[Case]) {
    let mut wrong = Vec::new();
    for case in cases {
        let what = match catch_unwind(AssertUnwindSafe(|| case.input.read())) {
            Err(_) => "panicked".to_string(),
            Ok(Ok(())) => "was accepted".to_string(),
            Ok(Err(error)) => {
                let message = error.to_string();
                let lacks = |w: &&&str| !message.contains(**w);
                let file = case.input.file();
                if let Some(missing) = case.want.iter().chain([&file]).find(lacks) {
                    format!("lacks {missing:?}: {message}")
                } else if message.chars().any(char::is_control) || message.len() > 3000 {
                    format!("is not fit to print: {message:?}")
                } else {
                    continue;
                }
            }
        };
        wrong.push(format!("{}: {what}", case.name));
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

impl Input {
    fn read(&self) -> Result<(), Error> {
        match self {
            Input::Header(text, data) => read(container(text.as_bytes(), &vec![0; *data])),
            Input::Bytes(make) => read(make()),
            Input::Config(at, value) => parse(&edited(at, value), None),
            Input::ConfigBytes(make) => parse(&make(), None),
            Input::Generation(text) => parse(CONFIG.as_bytes(), Some(text.as_bytes())),
            Input::Memory(make) => Checkpoint::from_files(regions(make())).map(drop),
            Input::Folder(spoil) => {
                let folder = Folder::new();
                write(&folder.0, "config.json", CONFIG.as_bytes());
                write(&folder.0, SHARD, &valid());
                Checkpoint::open(&folder.0).expect("the folder is valid before it is spoilt");
                spoil(&folder.0);
                Checkpoint::open(&folder.0).map(drop)
            }
            Input::Ask(make, what) => {
                let files = vec![file("config.json", CONFIG), (SHARD.into(), make())];
                what(&Checkpoint::from_files(regions(files)).expect("only the tensor is wrong"))
            }
        }
    }

    /// The file that the message has to name.
    fn file(&self) -> &'static str {
        match self {
            Input::Header(..) | Input::Bytes(_) | Input::Ask(..) => SHARD,
            Input::Config(..) | Input::ConfigBytes(_) => "config.json",
            Input::Generation(_) => "generation_config.json",
            // These name different ones, as each case says.
            Input::Memory(_) | Input::Folder(_) => "",
        }
    }
}

/// Reads a safetensors file alone and as a checkpoint's, which have to agree.
fn read(bytes: Vec<u8>) -> Result<(), Error> {
    let alone = SafeTensors::read(SHARD, ByteRegion::from_vec(bytes.clone())).map(drop);
    let files = vec![file("config.json", CONFIG), (SHARD.into(), bytes)];
    let in_checkpoint = Checkpoint::from_files(regions(files)).map(drop);
    let text = |r: &Result<(), Error>| r.as_ref().err().map(ToString::to_string);
    assert_eq!(text(&alone), text(&in_checkpoint));
    alone
}

/// Parses a configuration alone and as a checkpoint's, which have to agree.
fn parse(config: &[u8], generation: Option<&[u8]>) -> Result<(), Error> {
    let alone = ModelConfig::parse(config, generation);
    let mut files = vec![("config.json".to_string(), config.to_vec()), (SHARD.into(), valid())];
    files.extend(generation.map(|g| ("generation_config.json".to_string(), g.to_vec())));
    let in_checkpoint = Checkpoint::from_files(regions(files)).map(drop);
    assert_eq!(alone.as_ref().err().map(ToString::to_string), in_checkpoint.err().map(|e| e.to_string()));
    alone.map(|config| sane(&config))
}

/// What an accepted configuration guarantees.
fn sane(c: &ModelConfig) {
    assert!(c.vocab_size > 0 && c.hidden_size > 0 && c.num_hidden_layers > 0 && c.num_attention_heads > 0);
    assert!(c.qk_rope_head_dim.is_multiple_of(2) && c.q_lora_rank != Some(0));
    assert!(c.eos_token_ids.iter().chain(&c.bos_token_id).all(|t| (*t as usize) < c.vocab_size));
    assert!(c.rms_norm_eps > 0.0 && c.routed_scaling_factor > 0.0 && c.rope_theta > 1.0);
    if c.n_routed_experts > 0 {
        assert!(c.n_group > 0 && c.n_routed_experts.is_multiple_of(c.n_group) && c.topk_group <= c.n_group);
        assert!((1..=c.n_routed_experts).contains(&c.num_experts_per_tok) && c.moe_intermediate_size > 0);
    }
    for layer in 0..=c.num_hidden_layers + c.num_nextn_predict_layers {
        let _ = c.is_moe_layer(layer);
    }
}

/// What accepted weights guarantee: the views tile the data, and whatever is asked of them is answered.
fn walk(c: &Checkpoint) {
    let mut total = 0;
    for t in c.tensors() {
        total += t.bytes;
        let elements: usize = t.shape.iter().product();
        assert!(if elements == 0 { t.bytes == 0 } else { t.bytes.is_multiple_of(elements) });
        let _ = c.vector(t.name, t.shape.iter().product());
        if let [rows, cols] = *t.shape
            && let Ok(matrix) = c.matrix(t.name, rows, cols)
            && rows > 0
        {
            matrix.decode_row(rows - 1, &mut vec![0.0; cols]);
        }
    }
    assert_eq!(total, DATA_BYTES);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = valid();
    read(whole.clone()).expect("the whole file is valid");
    for len in 0..whole.len() {
        let error = read(whole[..len].to_vec()).expect_err("a cut file was accepted").to_string();
        assert!(error.starts_with(SHARD), "cut at {len}: {error}");
    }
    for len in 0..CONFIG.len() {
        let error = parse(&CONFIG.as_bytes()[..len], None).expect_err("a cut configuration was accepted");
        assert!(error.to_string().starts_with("config.json: not JSON"), "cut at {len}: {error}");
    }
}

#[test]
fn a_changed_byte_is_refused_or_harmless() {
    let (weights, config, header_end) = (valid(), CONFIG.as_bytes().to_vec(), header_end());
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % below
    };
    let mut refused = 0;
    for _ in 0..2000 {
        let (mut weights, mut config) = (weights.clone(), config.clone());
        let at = random(header_end + config.len());
        let bits = random(255) as u8 + 1;
        match at.checked_sub(header_end) {
            None => weights[at] ^= bits,
            Some(at) => config[at] ^= bits,
        }
        let files = vec![("config.json".to_string(), config), (SHARD.into(), weights)];
        let outcome = catch_unwind(|| match Checkpoint::from_files(regions(files)) {
            Err(error) => !error.to_string().is_empty(),
            Ok(checkpoint) => {
                sane(checkpoint.config());
                walk(&checkpoint);
                false
            }
        });
        refused += usize::from(outcome.unwrap_or_else(|_| panic!("byte {at} changed by {bits:#x}")));
    }
    assert!(refused > 1000, "only {refused} of 2000 changes were seen");
}

/// Of [`valid`].
const DATA_BYTES: usize = 16 + 6;

/// A small valid file: a matrix `m` of 2x2 and a vector `v` of 3.
fn valid() -> Vec<u8> {
    let (m, v) = (f32s(&[1.0, 2.0, 3.0, 4.0]), [0x80, 0x3f, 0, 0x40, 0x40, 0x40]);
    safetensors(&[("m", "F32", &[2, 2], &m), ("v", "BF16", &[3], &v)])
}

/// Where the data of [`valid`] begins.
fn header_end() -> usize {
    valid().len() - DATA_BYTES
}

fn cut(len: usize) -> Vec<u8> {
    valid()[..len].to_vec()
}

/// 64 bytes that claim a header of `length`.
fn length(length: u64) -> Vec<u8> {
    [length.to_le_bytes().as_slice(), &[b' '; 56]].concat()
}

fn nested_header(key: &str) -> Vec<u8> {
    container(format!("{{\"{key}\":{}", "[".repeat(50_000)).as_bytes(), b"")
}

fn million_sizes() -> Vec<u8> {
    let sizes = vec!["1"; 1_000_000].join(",");
    let header = format!(r#"{{"a":{{"dtype":"U8","shape":[{sizes}],"data_offsets":[0,1]}}}}"#);
    container(header.as_bytes(), &[0])
}

fn long_name() -> Vec<u8> {
    let name = "n".repeat(1 << 20);
    container(format!(r#"{{"{name}":{{"dtype":"?","shape":[],"data_offsets":[0,0]}}}}"#).as_bytes(), b"")
}

/// An FP8 matrix `w` of 129x1 with such scales.
fn fp8(dtype: &str, shape: &[usize], scales: &[u8]) -> Vec<u8> {
    safetensors(&[("w", "F8_E4M3", &[129, 1], &[0x38; 129]), ("w_scale_inv", dtype, shape, scales)])
}

fn file(name: &str, text: &str) -> (String, Vec<u8>) {
    (name.to_string(), text.as_bytes().to_vec())
}

fn with_index(text: &str) -> Files {
    vec![file("config.json", CONFIG), file(INDEX, text), (SHARD.into(), valid())]
}

fn huge_index() -> Files {
    let mut files = with_index(r#"{"weight_map":{"m":"model.safetensors"}}"#);
    files[1].1.resize((64 << 20) + 1, b' ');
    files
}

/// [`CONFIG`] with `what` written a second time.
fn twice(what: &str) -> Vec<u8> {
    swap(what, &format!("{what}, {what}"))
}

fn swap(from: &str, to: &str) -> Vec<u8> {
    assert_eq!(CONFIG.matches(from).count(), 1);
    CONFIG.replace(from, to).into_bytes()
}

fn wide_shared_experts() -> Vec<u8> {
    let config = swap("\"n_shared_experts\": 1", "\"n_shared_experts\": 4096");
    String::from_utf8(config)
        .unwrap()
        .replace("_intermediate_size\": 8", "_intermediate_size\": 16777216")
        .into()
}

/// Each size is allowed, their product is above 32 bits.
fn wide_heads() -> Vec<u8> {
    let config = CONFIG.replace("_heads\": 2", "_heads\": 65536");
    config
        .replace("nope_head_dim\": 4", "nope_head_dim\": 65536")
        .replace("v_head_dim\": 4", "v_head_dim\": 65536")
        .into()
}

fn edited(at: &str, value: &str) -> Vec<u8> {
    let mut config: Value = serde_json::from_str(CONFIG).unwrap();
    let (parent, field) = at.rsplit_once('/').unwrap();
    let parent = config.pointer_mut(parent).unwrap().as_object_mut().unwrap();
    if value.is_empty() {
        parent.remove(field).expect("a field to remove");
    } else {
        parent.insert(field.to_string(), serde_json::from_str(value).unwrap());
    }
    config.to_string().into_bytes()
}

/// A temporary folder, gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("oxseek-hostile-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A case may have removed it already.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn write(folder: &Path, name: &str, bytes: &[u8]) {
    fs::write(folder.join(name), bytes).unwrap();
}

fn remove(folder: &Path, name: &str) {
    fs::remove_file(folder.join(name)).unwrap();
}

fn mkdir(folder: &Path, name: &str) {
    remove(folder, name);
    fs::create_dir(folder.join(name)).unwrap();
}

fn rename(folder: &Path, from: &str, to: &str) {
    fs::rename(folder.join(from), folder.join(to)).unwrap();
}

fn index(folder: &Path, text: &str) {
    write(folder, INDEX, text.as_bytes());
}

/// An index that says that `m` is in `file`, spelt as in JSON.
fn map_to(folder: &Path, file: &str) {
    index(folder, &format!(r#"{{"weight_map":{{"m":"{file}"}}}}"#));
}

fn two_shards(folder: &Path) {
    remove(folder, SHARD);
    write(folder, "a.safetensors", &valid());
    write(folder, "b.safetensors", &safetensors(&[("b", "F32", &[1], &[0; 4])]));
}

fn wrong_shard(folder: &Path) {
    two_shards(folder);
    index(folder, r#"{"weight_map":{"m":"b.safetensors","v":"a.safetensors"}}"#);
}

fn same_tensor(folder: &Path) {
    two_shards(folder);
    write(folder, "b.safetensors", &valid());
    index(folder, r#"{"weight_map":{"m":"a.safetensors","v":"b.safetensors"}}"#);
}
