//! GGUF files that lie: each is refused with an error that names the file and the key or tensor, what was expected and
//! what was found; none panics.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
};

use common::{
    f32s,
    gguf::{FILE, Model, head, info, key, list, open, text},
};
use oxseek_tensor::{ByteRegion, DType};
use oxseek_weights::{
    Checkpoint, Error, Gguf,
    gguf::{Array, GgmlType, Value},
};

struct Case {
    name: &'static str,
    make: fn() -> Result<(), Error>,
    /// What the message has to contain.
    want: &'static [&'static str],
}

const fn case(name: &'static str, make: fn() -> Result<(), Error>, want: &'static [&'static str]) -> Case {
    Case { name, make, want }
}

/// Opens these bytes.
fn bytes(parts: &[&[u8]]) -> Result<(), Error> {
    open(parts.concat()).map(drop)
}

/// A file of one metadata entry.
fn entry(name: &[u8], kind: u32, value: &[u8]) -> Result<(), Error> {
    bytes(&[&head(3, 0, 1), &key(name, kind, value)])
}

/// A file of one tensor and so many bytes of data.
fn tensor(sizes: &[u64], kind: u32, offset: u64, data: usize) -> Result<(), Error> {
    tensors(&[info(b"t", sizes, kind, offset)], data)
}

fn tensors(infos: &[Vec<u8>], data: usize) -> Result<(), Error> {
    let mut file = [head(3, infos.len() as u64, 0), infos.concat()].concat();
    file.resize(file.len().next_multiple_of(32) + data, 0);
    open(file).map(drop)
}

/// The small valid model with one value changed.
fn with(key: &str, value: impl Into<Value>) -> Result<(), Error> {
    Model::tiny().with(key, value).open().map(drop)
}

fn without(key: &str) -> Result<(), Error> {
    Model::tiny().without(key).open().map(drop)
}

/// A file of 4 KiB that claims a text or list of `len`.
fn claims(kind: u32, value: &[u8]) -> Result<(), Error> {
    bytes(&[&head(3, 0, 1), &key(b"k", kind, value), &[0; 4096]])
}

const CONTAINER_CASES: &[Case] = &[
    case("an empty file", || bytes(&[]), &["truncated: the magic takes 4 bytes at byte 0, the file has 0"]),
    case("three bytes", || bytes(&[b"GGU"]), &["truncated: the magic", "has 3"]),
    case("a zip file", || bytes(&[b"PK\x03\x04aaaaaaaaaaaaaaaaaaaa"]), &["begins with", "expected \"GGUF\""]),
    case("the old container", || bytes(&[b"ggjt", &[0; 40]]), &["begins with \"ggjt\""]),
    case("no version", || bytes(&[b"GGUF"]), &["the version takes 4 bytes at byte 4"]),
    case("version 0", || bytes(&[&head(0, 0, 0)]), &["version 0, supported are 2 and 3"]),
    case("version 1", || bytes(&[&head(1, 0, 0)]), &["version 1", "convert the model anew"]),
    case("version 4", || bytes(&[&head(4, 0, 0)]), &["version 4, supported are 2 and 3"]),
    case("big-endian", || bytes(&[&head(3u32.swap_bytes(), 0, 0)]), &["big-endian"]),
    case("no counts", || bytes(&[b"GGUF\x03\0\0\0"]), &["the number of tensors", "at byte 8"]),
    case("a billion tensors", || bytes(&[&head(3, 1 << 30, 0)]), &["1073741824 tensors", "131072"]),
    case("the most tensors", || bytes(&[&head(3, u64::MAX, 0)]), &["18446744073709551615 tensors"]),
    case("a billion keys", || bytes(&[&head(3, 0, 1 << 30)]), &["1073741824 keys", "65536"]),
    case("the most keys", || bytes(&[&head(3, 0, u64::MAX)]), &["18446744073709551615 keys"]),
    case("no metadata at all", || bytes(&[&head(3, 0, 0)]), &["general.architecture", "missing"]),
    case(
        "a key that is not there",
        || bytes(&[&head(3, 0, 1)]),
        &["metadata entry 0 of 1 at byte 24", "its key"],
    ),
    case("a key without an end", || bytes(&[&head(3, 0, 1), &u64::MAX.to_le_bytes()]), &["at most 65535"]),
    case("a key past the file", || bytes(&[&head(3, 0, 1), &9u64.to_le_bytes()]), &["its key takes 9 bytes"]),
    case("a key that is no UTF-8", || entry(b"\xff\xfe", 4, &[0; 4]), &["its key is not UTF-8"]),
    case("a key with escapes", || entry(b"\x1b[2J\n", 99, &[]), &["key \\u{1b}[2J\\u{a}", "value type 99"]),
    case(
        "a key without a type",
        || bytes(&[&head(3, 0, 1), &text(b"k")]),
        &["key k", "its type takes 4 bytes"],
    ),
    case("an unknown type", || entry(b"k", 13, &[]), &["key k", "value type 13, expected 0 to 12"]),
    case("no value", || entry(b"k", 10, &[0; 7]), &["key k", "its value takes 8 bytes"]),
    case("a bool of 2", || entry(b"k", 7, &[2]), &["key k", "expected a bool, 0 or 1, found 2"]),
    case("a text without an end", || claims(8, &u64::MAX.to_le_bytes()), &["key k", "at most 16777216"]),
    case("a text past the file", || claims(8, &5000u64.to_le_bytes()), &["key k", "takes 5000 bytes"]),
    case("a text of bytes", || entry(b"k", 8, &text(b"\xc3\x28")), &["key k", "not UTF-8"]),
    case("a list without a length", || entry(b"k", 9, &[4, 0, 0, 0]), &["the length of its list"]),
    case("the longest list", || claims(9, &list(8, u64::MAX, &[])), &["key k", "at most 4194304"]),
    case("a list over the limit", || claims(9, &list(4, (1 << 22) + 1, &[])), &["4194305 elements"]),
    case("a list past the file", || claims(9, &list(12, 1 << 22, &[])), &["its list takes 33554432 bytes"]),
    case(
        "a list of long texts",
        || claims(9, &list(8, 2, &u64::MAX.to_le_bytes())),
        &["element 0", "16777216"],
    ),
    case(
        "a list with a text that is none",
        || entry(b"k", 9, &list(8, 2, &[text(b"a"), text(b"\xff")].concat())),
        &["key k", "element 1", "not UTF-8"],
    ),
    case("a list of unknowns", || entry(b"k", 9, &list(77, 0, &[])), &["value type 77"]),
    case("lists in lists", || entry(b"k", 9, &list(9, 1, &list(9, 1, &[]))), &["lists in lists"]),
    case("lists in lists, deep", || entry(b"k", 9, &list(9, 1, &[9; 4096])), &["lists in lists"]),
    case(
        "a key twice",
        || bytes(&[&head(3, 0, 2), &key(b"k", 0, &[1]), &key(b"k", 0, &[2])]),
        &["key k", "is in the file twice"],
    ),
    case(
        "alignment 0 by hand",
        || entry(b"general.alignment", 4, &[0; 4]),
        &["general.alignment", "found 0"],
    ),
    case(
        "alignment 48",
        || entry(b"general.alignment", 4, &48u32.to_le_bytes()),
        &["a power of two", "found 48"],
    ),
    case(
        "a huge alignment",
        || entry(b"general.alignment", 10, &(1u64 << 63).to_le_bytes()),
        &["general.alignment", "at most 2097152", "found 9223372036854775808"],
    ),
    case(
        "a negative alignment",
        || entry(b"general.alignment", 5, &[0xe0, 0xff, 0xff, 0xff]),
        &["found -32"],
    ),
    case("alignment as text", || entry(b"general.alignment", 8, &text(b"32")), &["found \"32\""]),
    case(
        "a tensor that is not there",
        || bytes(&[&head(3, 1, 0)]),
        &["tensor 0 of 1 at byte 24", "its name"],
    ),
    case("a name of a megabyte", || tensors(&[info(&[b'n'; 1 << 20], &[1], 0, 0)], 4), &["at most 1024"]),
    case("a name that is no UTF-8", || tensors(&[info(b"\xff", &[1], 0, 0)], 4), &["its name is not UTF-8"]),
    case("no dimensions", || tensor(&[], 0, 0, 4), &["tensor t", "0 dimensions, expected 1 to 4"]),
    case("five dimensions", || tensor(&[1; 5], 0, 0, 4), &["tensor t", "5 dimensions"]),
    case(
        "a billion dimensions",
        || bytes(&[&head(3, 1, 0), &text(b"t"), &[0xff; 200]]),
        &["tensor t", "4294967295 dimensions"],
    ),
    case("a size of 0", || tensor(&[4, 0], 0, 0, 4), &["tensor t", "a dimension of 0 elements"]),
    case("sizes cut off", || bytes(&[&head(3, 1, 0), &text(b"t"), &[2, 0, 0, 0], &[1; 12]]), &["its sizes"]),
    case("sizes that overflow", || tensor(&[1 << 33, 1 << 33], 0, 0, 4), &["tensor t", "overflows"]),
    case("bytes that overflow", || tensor(&[1 << 62], 0, 0, 4), &["tensor t", "overflows"]),
    case("the largest size", || tensor(&[u64::MAX], 24, 0, 4), &["tensor t", "18446744073709551615"]),
    case("an unknown tensor type", || tensor(&[4], 4, 0, 16), &["tensor t", "unknown tensor type 4"]),
    case("a far tensor type", || tensor(&[4], u32::MAX, 0, 16), &["unknown tensor type 4294967295"]),
    case(
        "rows of half a block",
        || tensor(&[48, 2], 8, 0, 102),
        &["tensor t", "48 values", "Q8_0 blocks of 32"],
    ),
    case("rows of half a super-block", || tensor(&[128], 12, 0, 144), &["Q4_K blocks of 256"]),
    case("an unaligned offset", || tensor(&[4], 0, 8, 64), &["tensor t", "offset 8", "alignment, 32"]),
    case("an offset past the file", || tensor(&[4], 0, 64, 64), &["tensor t", "offset 64", "which has 64"]),
    case("the largest offset", || tensor(&[4], 0, u64::MAX - 31, 64), &["tensor t", "truncated"]),
    case("data cut off", || tensor(&[4], 0, 0, 15), &["tensor t", "takes 16 bytes", "has 15"]),
    case("no data at all", || bytes(&[&head(3, 1, 0), &info(b"t", &[4], 0, 0)]), &["tensor t", "has 0"]),
    case(
        "a tensor twice",
        || tensors(&[info(b"t", &[4], 0, 0), info(b"t", &[4], 0, 32)], 64),
        &["tensor t", "is in the file twice"],
    ),
    case(
        "tensors in the same place",
        || tensors(&[info(b"a", &[4], 0, 0), info(b"b", &[4], 0, 0)], 64),
        &["tensor b", "inside of a"],
    ),
    case(
        "tensors that overlap",
        || tensors(&[info(b"a", &[9], 0, 0), info(b"b", &[4], 0, 32)], 64),
        &["tensor b", "inside of a"],
    ),
];

const METADATA_CASES: &[Case] = &[
    case("no architecture", || without("general.architecture"), &["general.architecture", "missing"]),
    case("llama", || with("general.architecture", "llama"), &["found \"llama\"", "deepseek2"]),
    case("V3.2", || with("general.architecture", "deepseek32"), &["sparse attention"]),
    case("a number for it", || with("general.architecture", 2u32), &["found 2, supported is deepseek2"]),
    case("an adapter", || with("general.type", "adapter"), &["general.type", "not a model"]),
    case("no layers", || without("deepseek2.block_count"), &["deepseek2.block_count", "missing"]),
    case(
        "0 layers",
        || with("deepseek2.block_count", 0u32),
        &["deepseek2.block_count", "1 to 1024, found 0"],
    ),
    case("many layers", || with("deepseek2.block_count", u32::MAX), &["1 to 1024, found 4294967295"]),
    case("-1 layers", || with("deepseek2.block_count", -1i32), &["1 to 1024, found -1"]),
    case("text for layers", || with("deepseek2.block_count", "2"), &["found \"2\""]),
    case("a list of layers", || with("deepseek2.block_count", Array::i32s(&[2])), &["an array of 1 int32"]),
    case(
        "only MTP layers",
        || with("deepseek2.nextn_predict_layers", 2u32),
        &["found 2 in a model of 2 layers"],
    ),
    case("many MTP layers", || with("deepseek2.nextn_predict_layers", 65u32), &["0 to 64, found 65"]),
    case(
        "no hidden size",
        || without("deepseek2.embedding_length"),
        &["deepseek2.embedding_length", "missing"],
    ),
    case(
        "a huge hidden size",
        || with("deepseek2.embedding_length", u64::MAX),
        &["deepseek2.embedding_length", "found 18446744073709551615"],
    ),
    case("no heads", || without("deepseek2.attention.head_count"), &["attention.head_count", "missing"]),
    case(
        "grouped heads",
        || with("deepseek2.attention.head_count_kv", 4u32),
        &["expected 1 or", "2, as", "found 4"],
    ),
    case("no latent", || without("deepseek2.attention.kv_lora_rank"), &["kv_lora_rank", "missing"]),
    case(
        "a key shorter than its rope",
        || with("deepseek2.attention.key_length_mla", 4u32),
        &["deepseek2.attention.key_length_mla", "more than rope.dimension_count, 4, found 4"],
    ),
    case("a key of 0", || with("deepseek2.attention.key_length_mla", 0u32), &["key_length_mla", "found 0"]),
    case(
        "a wide value",
        || with("deepseek2.attention.value_length_mla", 65_537u32),
        &["value_length_mla", "65536"],
    ),
    case(
        "no key length of either kind",
        || {
            let model = Model::tiny().without("deepseek2.attention.key_length_mla");
            model.without("deepseek2.attention.key_length").open().map(drop)
        },
        &["deepseek2.attention.key_length", "missing"],
    ),
    case("an odd rope", || with("deepseek2.rope.dimension_count", 5u32), &["rope.dimension_count", "even"]),
    case("wide heads", wide_heads, &["deepseek2.attention.head_count", "at most 67108864"]),
    case("no eps", || without("deepseek2.attention.layer_norm_rms_epsilon"), &["rms_epsilon", "missing"]),
    case(
        "an eps of 0",
        || with("deepseek2.attention.layer_norm_rms_epsilon", 0f32),
        &["rms_epsilon", "found 0"],
    ),
    case(
        "an eps that is no number",
        || with("deepseek2.attention.layer_norm_rms_epsilon", f32::NAN),
        &["NaN"],
    ),
    case("a rope base of 1", || with("deepseek2.rope.freq_base", 1f32), &["rope.freq_base", "found 1"]),
    case("an endless rope base", || with("deepseek2.rope.freq_base", f32::INFINITY), &["freq_base", "inf"]),
    case(
        "an unknown rope",
        || with("deepseek2.rope.scaling.type", "linear"),
        &["found linear", "none and yarn"],
    ),
    case("a number for a rope", || with("deepseek2.rope.scaling.type", 1u32), &["expected text, found 1"]),
    case("no factor", || without("deepseek2.rope.scaling.factor"), &["rope.scaling.factor", "missing"]),
    case("a factor of 0", || with("deepseek2.rope.scaling.factor", 0f32), &["factor", "found 0"]),
    case("no original context", || without("deepseek2.rope.scaling.original_context_length"), &["missing"]),
    case(
        "a negative beta",
        || with("deepseek2.rope.scaling.yarn_beta_fast", -1f32),
        &["beta_fast", "found -1"],
    ),
    case(
        "another ext factor",
        || with("deepseek2.rope.scaling.yarn_ext_factor", 0f32),
        &["ext_factor", "is 1"],
    ),
    case(
        "a negative mscale",
        || with("deepseek2.rope.scaling.yarn_log_multiplier", -1f32),
        &["log_multiplier"],
    ),
    case("no context", || without("deepseek2.context_length"), &["deepseek2.context_length", "missing"]),
    case(
        "softmax and more",
        || with("deepseek2.expert_gating_func", 3u32),
        &["expert_gating_func", "found 3"],
    ),
    case("many experts", || with("deepseek2.expert_count", 4097u32), &["expert_count", "0 to 4096"]),
    case(
        "no experts per token",
        || with("deepseek2.expert_used_count", 0u32),
        &["deepseek2.expert_used_count"],
    ),
    case("more than there are", || with("deepseek2.expert_used_count", 9u32), &["at most the 4", "found 9"]),
    case("groups that do not divide", || with("deepseek2.expert_group_count", 3u32), &["expert_group_count"]),
    case("groups of one", || with("deepseek2.expert_group_count", 8u32), &["groups of one expert"]),
    case(
        "more groups kept",
        || with("deepseek2.expert_group_used_count", 5u32),
        &["group_used_count", "found 5"],
    ),
    case(
        "no groups kept",
        || without("deepseek2.expert_group_used_count"),
        &["group_used_count", "missing or 0"],
    ),
    case("no width", || without("deepseek2.expert_feed_forward_length"), &["expert_feed_forward_length"]),
    case("a number for a flag", || with("deepseek2.expert_weights_norm", 1u32), &["true or false, found 1"]),
    case(
        "a negative scale",
        || with("deepseek2.expert_weights_scale", -1f32),
        &["weights_scale", "found -1"],
    ),
    case("an end past the vocabulary", || with("tokenizer.ggml.eos_token_id", 64u32), &["0 to 63, found 64"]),
    case(
        "a beginning past it",
        || with("tokenizer.ggml.bos_token_id", u32::MAX),
        &["bos_token_id", "0 to 63"],
    ),
    case(
        "no vocabulary",
        || {
            let model = Model::tiny().without("deepseek2.vocab_size").less("token_embd.weight");
            model.open().map(drop)
        },
        &["deepseek2.vocab_size", "missing"],
    ),
];

fn wide_heads() -> Result<(), Error> {
    let model = Model::tiny().with("deepseek2.attention.head_count", 65_536u32);
    model.with("deepseek2.attention.key_length_mla", 65_536u32).open().map(drop)
}

/// Asks a model for a matrix.
fn ask(model: &Model, name: &str, rows: usize, cols: usize) -> Result<(), Error> {
    model.open().expect("only the tensor is wrong").matrix(name, rows, cols).map(drop)
}

const KV_B: &str = "model.layers.0.self_attn.kv_b_proj.weight";

/// Rows of `kv_b_proj` of the small model.
const KV_B_ROWS: usize = 2 * (32 + 2);

const TENSOR_CASES: &[Case] = &[
    case(
        "another shape",
        || ask(&Model::tiny(), "lm_head.weight", 32, 64),
        &["tensor output.weight", "expected shape [32, 64], found [64, 32]"],
    ),
    case(
        "one that is missing",
        || ask(&Model::tiny(), "model.layers.0.self_attn.o_proj.weight", 1, 2),
        &["tensor blk.0.attn_output.weight", "is missing, expected shape [1, 2]"],
    ),
    case("a name of nothing", || ask(&Model::tiny(), "\x1b[0m", 1, 1), &["tensor \\u{1b}[0m", "is missing"]),
    case(
        "a type without kernels",
        || {
            let mut model = Model::tiny();
            let iq = GgmlType::all().find(|t| t.name() == "IQ2_XXS").unwrap();
            model.tensors.push(("blk.0.attn_q_a.weight".into(), iq, vec![1, 256], vec![0; 66]));
            ask(&model, "model.layers.0.self_attn.q_a_proj.weight", 1, 256)
        },
        &["tensor blk.0.attn_q_a.weight", "its type, IQ2_XXS, is not supported"],
    ),
    case(
        "an expert past the last",
        || ask(&Model::tiny(), "model.layers.1.mlp.experts.8.gate_proj.weight", 32, 32),
        &["expert 8", "is missing"],
    ),
    case(
        "an expert far past the last",
        || ask(&Model::tiny(), "model.layers.1.mlp.experts.18446744073709551615.gate_proj.weight", 32, 32),
        &["expert 18446744073709551615", "is missing"],
    ),
    case(
        "fewer experts than said",
        || {
            let model = Model::tiny().tensor("blk.1.ffn_gate_exps.weight", &[7, 32, 32], &[0.0; 7 * 32 * 32]);
            ask(&model, "model.layers.1.mlp.experts.0.gate_proj.weight", 32, 32)
        },
        &["tensor blk.1.ffn_gate_exps.weight", "expected shape [8, 32, 32], found [7, 32, 32]"],
    ),
    case(
        "keys of another shape",
        || {
            let model = Model::tiny().tensor("blk.0.attn_k_b.weight", &[2, 16, 64], &[0.0; 2048]);
            ask(&model, KV_B, KV_B_ROWS, 32)
        },
        &["tensor blk.0.attn_k_b.weight", "expected shape [2, 32, 32], found [2, 16, 64]"],
    ),
    case(
        "values of another shape",
        || ask(&Model::tiny().tensor("blk.0.attn_v_b.weight", &[2, 64], &[0.0; 128]), KV_B, KV_B_ROWS, 32),
        &["tensor blk.0.attn_v_b.weight", "found [2, 64]"],
    ),
    case(
        "no values",
        || ask(&Model::tiny().less("blk.0.attn_v_b.weight"), KV_B, KV_B_ROWS, 32),
        &["tensor blk.0.attn_v_b.weight", "is missing"],
    ),
    case(
        "neither keys nor values nor both",
        || ask(&Model::tiny().less("blk.0.attn_k_b.weight"), KV_B, KV_B_ROWS, 32),
        &["tensor blk.0.attn_kv_b.weight", "is missing"],
    ),
    case("a wrong sum of both", || ask(&Model::tiny(), KV_B, 1, 32), &["tensor blk.0.attn_k_b.weight"]),
    case(
        "a vector of another length",
        || Model::tiny().open().unwrap().vector("model.norm.weight", 31).map(drop),
        &["tensor output_norm.weight", "expected shape [31], found [32]"],
    ),
    case(
        "a vector with a hole",
        || {
            let model = Model::tiny().tensor("output_norm.weight", &[2], &[1.0, f32::NAN]);
            model.open().unwrap().vector("model.norm.weight", 2).map(drop)
        },
        &["tensor output_norm.weight", "value 1 is NaN"],
    ),
    case(
        "a vector in blocks",
        || {
            let model = Model::tiny().stored("output_norm.weight", DType::Q8_0, &[32], vec![0; 34]);
            model.open().unwrap().vector("model.norm.weight", 32).map(drop)
        },
        &["tensor output_norm.weight", "found Q8_0"],
    ),
];

/// Parts of a model, each with its metadata.
fn parts(of: &[&[(&str, Value)]]) -> Vec<(String, ByteRegion)> {
    let file = |i: usize, metadata: &[(&str, Value)]| {
        let mut model = Model::tiny();
        if i > 0 {
            model = Model { metadata: Vec::new(), tensors: Vec::new() };
            model = model.tensor(&format!("part.{i}"), &[1], &[0.0]);
        }
        for (key, value) in metadata {
            model = model.with(key, value.clone());
        }
        (format!("m-{:05}-of-{:05}.gguf", i + 1, of.len()), ByteRegion::from_vec(model.bytes()))
    };
    of.iter().enumerate().map(|(i, m)| file(i, m)).collect()
}

fn split(no: u16, count: u16, tensors: i32) -> [(&'static str, Value); 3] {
    [("split.no", no.into()), ("split.count", count.into()), ("split.tensors.count", tensors.into())]
}

/// Tensors of the small model and one of a second part.
const SPLIT_TENSORS: i32 = 8;

fn read_parts(of: &[&[(&str, Value)]]) -> Result<(), Error> {
    Checkpoint::from_files(parts(of)).map(drop)
}

const PART_CASES: &[Case] = &[
    case(
        "a part alone",
        || read_parts(&[&split(0, 2, SPLIT_TENSORS)]),
        &["m-00001-of-00001.gguf", "split.count", "has 2 parts, 1 are given"],
    ),
    case(
        "a file without numbers as a part",
        || read_parts(&[&split(0, 2, SPLIT_TENSORS), &[]]),
        &["m-00002-of-00002.gguf", "split.count", "has 1 parts, 2 are given"],
    ),
    case(
        "a number twice",
        || read_parts(&[&split(0, 2, SPLIT_TENSORS), &split(0, 2, SPLIT_TENSORS)]),
        &["split.no", "found 0, as in m-00001-of-00002.gguf"],
    ),
    case(
        "a number past the last",
        || read_parts(&[&split(0, 2, SPLIT_TENSORS), &split(2, 2, SPLIT_TENSORS)]),
        &["m-00002-of-00002.gguf", "split.no", "found 2, expected less than 2"],
    ),
    case(
        "text for a number",
        || read_parts(&[&[("split.no", "0".into()), ("split.count", 1u16.into())]]),
        &["split.no", "expected a whole number, found \"0\""],
    ),
    case(
        "a negative count",
        || read_parts(&[&[("split.count", (-1i32).into())]]),
        &["split.count", "expected a whole number, found -1"],
    ),
    case(
        "fewer tensors than there were",
        || read_parts(&[&split(0, 2, 9), &split(1, 2, 9)]),
        &["split.tensors.count", "9 tensors, found 8"],
    ),
    case(
        "a tensor in two parts",
        || {
            let mut parts = parts(&[&split(0, 2, SPLIT_TENSORS), &split(1, 2, SPLIT_TENSORS)]);
            let [no, count, tensors] = split(1, 2, SPLIT_TENSORS);
            let second = Model { metadata: Vec::new(), tensors: Vec::new() }
                .with(no.0, no.1)
                .with(count.0, count.1)
                .with(tensors.0, tensors.1)
                .tensor("output.weight", &[1], &[0.0]);
            parts[1].1 = ByteRegion::from_vec(second.bytes());
            Checkpoint::from_files(parts).map(drop)
        },
        &["m-00002-of-00002.gguf", "tensor output.weight", "is in m-00001-of-00002.gguf too"],
    ),
    case(
        "a file given twice",
        || {
            let mut parts = parts(&[&[]]);
            parts.push(parts[0].clone());
            Checkpoint::from_files(parts).map(drop)
        },
        &["m-00001-of-00001.gguf", "given twice"],
    ),
    case("no file", || Gguf::from_files(Vec::new()).map(drop), &["no file is given"]),
];

#[test]
fn hostile_containers_are_refused() {
    check(CONTAINER_CASES, FILE);
}

#[test]
fn hostile_metadata_is_refused() {
    check(METADATA_CASES, FILE);
}

#[test]
fn hostile_tensors_are_refused() {
    check(TENSOR_CASES, FILE);
}

#[test]
fn hostile_parts_are_refused() {
    check(PART_CASES, "");
}

/// Runs every case and fails with all that went wrong, not only the first.
fn check(cases: &[Case], file: &str) {
    let mut wrong = Vec::new();
    for case in cases {
        let what = match catch_unwind(AssertUnwindSafe(case.make)) {
            Err(_) => "panicked".to_string(),
            Ok(Ok(())) => "was accepted".to_string(),
            Ok(Err(error)) => {
                let message = error.to_string();
                if let Some(lacks) = case.want.iter().chain([&file]).find(|w| !message.contains(**w)) {
                    format!("lacks {lacks:?}: {message}")
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

/// Where the data of the small model begins.
fn head_len(file: &[u8]) -> usize {
    let data: usize = Model::tiny().tensors.iter().map(|t| t.3.len().next_multiple_of(32)).sum();
    file.len() - data
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = Model::tiny().bytes();
    open(whole.clone()).expect("the whole file is valid");
    let head = head_len(&whole);
    let data = (head..whole.len()).step_by(997);
    for len in (0..head).chain(data) {
        let error = open(whole[..len].to_vec()).expect_err("a cut file was accepted").to_string();
        assert!(error.starts_with(FILE), "cut at {len}: {error}");
    }
}

#[test]
fn a_changed_byte_is_refused_or_harmless() {
    let whole = Model::tiny().bytes();
    let head = head_len(&whole);
    let mut refused = 0;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for at in 0..head {
        for bits in [1u8, 0x80, 0xff, 0] {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let mut file = whole.clone();
            file[at] ^= if bits == 0 { (state >> 56) as u8 } else { bits };
            let outcome = catch_unwind(|| match open(file) {
                Err(error) => !error.to_string().is_empty(),
                Ok(checkpoint) => {
                    walk(&checkpoint);
                    false
                }
            });
            refused += usize::from(outcome.unwrap_or_else(|_| panic!("byte {at} changed by {bits:#x}")));
        }
    }
    // Most bytes are names, of which the reader asks for a few.
    assert!(refused > head, "only {refused} of {} changes were seen", head * 4);
}

/// Whatever is asked of an accepted file is answered.
fn walk(c: &Checkpoint) {
    for t in c.tensors() {
        let _ = c.vector(&t.model_name, t.shape.iter().product());
        if let [rows, cols] = *t.shape
            && let Ok(matrix) = c.matrix(&t.model_name, rows, cols)
        {
            matrix.decode_row(rows - 1, &mut vec![0.0; cols]);
        }
    }
    let config = c.config();
    let rows = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim);
    if rows * config.kv_lora_rank < 1 << 20 {
        let _ = c.matrix(KV_B, rows, config.kv_lora_rank);
    }
    let _ = c.made_bytes();
    for (_, value) in c.gguf().unwrap().metadata() {
        let _ = value.as_array().and_then(Array::as_texts).map(Iterator::count);
        let _ = value.as_array().and_then(Array::as_i64s).map(Iterator::count);
    }
}

#[test]
fn paths_that_are_no_model_are_refused() {
    let folder = std::env::temp_dir().join(format!("oxseek-gguf-hostile-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let error = |name: &str| Checkpoint::open(&folder.join(name)).unwrap_err().to_string();
    fs::write(folder.join("a-00001-of-00002.gguf"), b"GGUF").unwrap();
    assert!(error("a-00001-of-00002.gguf").contains("a-00002-of-00002.gguf: is missing, part 2 of 2"));
    assert!(error("a-00002-of-00002.gguf").contains("No such file"));
    fs::write(folder.join("a-00001-of-99999.gguf"), b"GGUF").unwrap();
    assert!(error("a-00001-of-99999.gguf").contains("99999 parts, at most 1000"));
    assert!(error("").contains("several models, a-00001-of-00002.gguf to a-00001-of-99999.gguf"));
    fs::write(folder.join("weights.bin"), b"GGUF").unwrap();
    assert!(error("weights.bin").contains("or a .gguf file"));
    fs::write(folder.join("empty.gguf"), b"").unwrap();
    assert!(error("empty.gguf").contains("the file is empty"));
    fs::create_dir_all(folder.join("folder.gguf")).unwrap();
    assert!(error("folder.gguf").contains("config.json"));
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn the_writer_refuses_what_no_file_can_hold() {
    let f32 = GgmlType::of(DType::F32).unwrap();
    let mut writer = oxseek_weights::gguf::GgufWriter::new();
    writer.set("a", 1u32).unwrap();
    assert!(writer.set("a", 2u32).is_err());
    assert!(writer.set("general.alignment", 33u32).is_err());
    for (name, shape) in [("no", &[][..]), ("zero", &[2, 0]), ("five", &[1; 5]), ("huge", &[usize::MAX; 3])] {
        assert!(writer.tensor(name, f32, shape).is_err(), "{name}");
    }
    assert!(writer.tensor("half", GgmlType::of(DType::Q8_0).unwrap(), &[2, 48]).is_err());
    writer.tensor("t", f32, &[2]).unwrap();
    assert!(writer.tensor("t", f32, &[2]).is_err());
    let mut body = writer.begin(Vec::new()).unwrap();
    body.write(&f32s(&[1.0])).unwrap();
    assert!(body.finish().is_err());
}
