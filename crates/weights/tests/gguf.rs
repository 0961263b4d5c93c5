//! Sound GGUF files: what they describe, and their tensors under the names of Hugging Face checkpoints.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;

use common::gguf::{FILE, Model, key, list, open, text};
use oxseek_tensor::{
    ByteRegion, DType, HostMatrix,
    backend::Scoring,
    dtype::{f32_to_bf16, f32_to_f16},
};
use oxseek_weights::{
    Checkpoint, Gguf, ModelConfig, TopkMethod,
    gguf::{Array, GgufWriter, Value},
};

/// What llama.cpp's converter writes for a model of the family.
struct Written {
    layers: u32,
    hidden: u32,
    heads: u32,
    q_lora: Option<u32>,
    dense: u32,
    inner: [u32; 2],
    /// Routed, used, shared.
    experts: [u32; 3],
    groups: Option<[u32; 2]>,
    gating: Option<u32>,
    scale: f32,
    norm: bool,
    eps: f32,
    theta: f32,
    /// Factor, `yarn_log_multiplier`.
    yarn: Option<(f32, f32)>,
    vocab: u32,
}

impl Written {
    fn model(&self) -> Model {
        let key = |k: &str| format!("deepseek2.{k}");
        let mut metadata: Vec<(String, Value)> = vec![
            ("general.architecture".into(), "deepseek2".into()),
            (key("block_count"), self.layers.into()),
            (key("context_length"), 163_840u32.into()),
            (key("embedding_length"), self.hidden.into()),
            (key("feed_forward_length"), self.inner[0].into()),
            (key("expert_feed_forward_length"), self.inner[1].into()),
            (key("attention.head_count"), self.heads.into()),
            (key("attention.head_count_kv"), 1u32.into()),
            (key("attention.kv_lora_rank"), 512u32.into()),
            (key("attention.key_length"), 576u32.into()),
            (key("attention.value_length"), 512u32.into()),
            (key("attention.key_length_mla"), 192u32.into()),
            (key("attention.value_length_mla"), 128u32.into()),
            (key("attention.layer_norm_rms_epsilon"), self.eps.into()),
            (key("rope.dimension_count"), 64u32.into()),
            (key("rope.freq_base"), self.theta.into()),
            (key("leading_dense_block_count"), self.dense.into()),
            (key("expert_count"), self.experts[0].into()),
            (key("expert_used_count"), self.experts[1].into()),
            (key("expert_shared_count"), self.experts[2].into()),
            (key("expert_weights_scale"), self.scale.into()),
            (key("vocab_size"), self.vocab.into()),
        ];
        metadata.extend(self.q_lora.map(|n| (key("attention.q_lora_rank"), n.into())));
        metadata.extend(self.gating.map(|n| (key("expert_gating_func"), n.into())));
        metadata.extend(self.norm.then(|| (key("expert_weights_norm"), true.into())));
        for (name, i) in [("expert_group_count", 0), ("expert_group_used_count", 1)] {
            metadata.extend(self.groups.map(|g| (key(name), g[i].into())));
        }
        if let Some((factor, multiplier)) = self.yarn {
            metadata.push((key("rope.scaling.type"), "yarn".into()));
            metadata.push((key("rope.scaling.factor"), factor.into()));
            metadata.push((key("rope.scaling.original_context_length"), 4096u32.into()));
            metadata.push((key("rope.scaling.yarn_log_multiplier"), multiplier.into()));
        }
        let model = Model { metadata, tensors: Vec::new() };
        if self.gating == Some(2) {
            return model.tensor("blk.3.exp_probs_b.bias", &[1], &[0.0]);
        }
        model
    }

    fn open(&self) -> (ModelConfig, Vec<String>) {
        let checkpoint = self.model().open().unwrap();
        (checkpoint.config().clone(), checkpoint.warnings().to_vec())
    }
}

const V2_LITE: Written = Written {
    layers: 27,
    hidden: 2048,
    heads: 16,
    q_lora: None,
    dense: 1,
    inner: [10_944, 1408],
    experts: [64, 6, 2],
    groups: None,
    gating: None,
    scale: 1.0,
    norm: false,
    eps: 1e-6,
    theta: 10_000.0,
    yarn: Some((40.0, 0.0707)),
    vocab: 102_400,
};
const V2: Written = Written {
    layers: 60,
    hidden: 5120,
    heads: 128,
    q_lora: Some(1536),
    inner: [12_288, 1536],
    experts: [160, 6, 2],
    scale: 16.0,
    ..V2_LITE
};
const V3: Written = Written {
    layers: 61,
    hidden: 7168,
    dense: 3,
    inner: [18_432, 2048],
    experts: [256, 8, 1],
    gating: Some(2),
    scale: 2.5,
    norm: true,
    yarn: Some((40.0, 0.1)),
    vocab: 129_280,
    ..V2
};
const KIMI_K2: Written = Written {
    heads: 64,
    dense: 1,
    experts: [384, 8, 1],
    groups: Some([1, 1]),
    scale: 2.827,
    theta: 50_000.0,
    yarn: Some((32.0, 0.1)),
    vocab: 163_840,
    ..V3
};
const MOONLIGHT: Written = Written {
    inner: [11_264, 1408],
    groups: Some([1, 1]),
    gating: Some(2),
    scale: 2.446,
    norm: true,
    eps: 1e-5,
    theta: 50_000.0,
    yarn: None,
    vocab: 163_840,
    ..V2_LITE
};

#[test]
fn the_family_is_described() {
    let (c, warnings) = V2_LITE.open();
    assert_eq!((c.num_hidden_layers, c.q_lora_rank, c.n_group), (27, None, 1));
    assert_eq!((c.scoring, c.topk_method, c.norm_topk_prob), (Scoring::Softmax, TopkMethod::Greedy, false));
    assert_eq!((c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim), (128, 64, 128));
    assert_eq!(c.yarn.as_ref().and_then(|y| y.mscale_all_dim), Some(0.707));
    assert!(warnings.is_empty(), "{warnings:?}");

    let (c, warnings) = V3.open();
    assert_eq!((c.n_group, c.topk_group, c.q_lora_rank), (8, 4, Some(1536)));
    assert_eq!((c.scoring, c.topk_method, c.norm_topk_prob), (Scoring::Sigmoid, TopkMethod::NoauxTc, true));
    let yarn = c.yarn.unwrap();
    assert_eq!((yarn.factor, yarn.beta_fast, yarn.beta_slow), (40.0, 32.0, 1.0));
    assert_eq!((yarn.mscale, yarn.mscale_all_dim, yarn.attention_factor), (Some(1.0), Some(1.0), None));
    assert_eq!((c.first_k_dense_replace, c.routed_scaling_factor, c.rms_norm_eps), (3, 2.5, 1e-6));
    let want = "model.gguf: deepseek2.expert_group_count is missing, using 8 groups, of which 4 are kept, as \
                DeepSeek-V3 has";
    assert_eq!(warnings, [want]);

    let (c, warnings) = Written { groups: Some([8, 4]), ..V3 }.open();
    assert_eq!((c.n_group, c.topk_group, warnings.len()), (8, 4, 0));

    let (c, warnings) = V2.open();
    assert_eq!((c.n_group, c.topk_group, c.topk_method), (8, 3, TopkMethod::GroupLimitedGreedy));
    assert_eq!(warnings.len(), 1);

    let (c, _) = MOONLIGHT.open();
    assert_eq!((c.topk_method, c.n_group, c.yarn, c.rms_norm_eps), (TopkMethod::NoauxTc, 1, None, 1e-5));
    assert_eq!(c.routed_scaling_factor, 2.446);

    let (c, warnings) = KIMI_K2.open();
    let yarn = c.yarn.unwrap();
    assert_eq!((yarn.beta_fast, yarn.beta_slow, c.n_group), (1.0, 1.0, 1));
    assert!(warnings[0].contains("yarn_beta_fast is missing, using 1, as Kimi-K2 has"), "{warnings:?}");

    let (c, warnings) = Written { experts: [128, 8, 1], ..V3 }.open();
    assert_eq!((c.n_group, c.topk_method), (1, TopkMethod::NoauxTc));
    assert!(warnings[0].contains("no groups: if the model has some"), "{warnings:?}");
}

#[test]
fn legacy_files_are_described() {
    let legacy = V3
        .model()
        .without("deepseek2.attention.key_length_mla")
        .without("deepseek2.attention.value_length_mla")
        .without("deepseek2.expert_gating_func")
        .with("deepseek2.attention.head_count_kv", 128u32)
        .with("deepseek2.attention.key_length", 192u32)
        .with("deepseek2.attention.value_length", 128u32);
    let checkpoint = legacy.open().unwrap();
    let c = checkpoint.config();
    assert_eq!((c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim), (128, 64, 128));
    // By its correction bias.
    assert_eq!((c.scoring, c.topk_method), (Scoring::Sigmoid, TopkMethod::NoauxTc));
    assert!(checkpoint.warnings()[0].contains("expert_gating_func"), "{:?}", checkpoint.warnings());
    assert!(c.tie_word_embeddings, "there is no output.weight");
}

#[test]
fn mtp_layers_count_only_when_they_are_there() {
    let model = Model::tiny().with("deepseek2.nextn_predict_layers", 1u32);
    let layers = |m: &Model| {
        let checkpoint = m.open().unwrap();
        let c = checkpoint.config();
        (c.num_hidden_layers, c.num_nextn_predict_layers, checkpoint.warnings().len())
    };
    assert_eq!(layers(&model.clone().tensor("blk.1.nextn.eh_proj.weight", &[1], &[0.0])), (1, 1, 0));
    assert_eq!(layers(&model.clone().tensor("blk.1.attn_norm.weight", &[1], &[0.0])), (2, 0, 1));
    assert_eq!(layers(&model), (1, 0, 1));
}

#[test]
fn tokens_that_end_an_answer_are_found() {
    let tokens = Array::texts(["a", "b", "c", "<|im_end|>"]);
    let model = Model::tiny().with("tokenizer.ggml.tokens", tokens).with("tokenizer.ggml.eot_token_id", 2u32);
    let checkpoint = model.open().unwrap();
    assert_eq!(checkpoint.config().bos_token_id, Some(0));
    assert_eq!(checkpoint.config().eos_token_ids, [1, 2, 3]);
}

/// `n` values that differ and are exact in every format here.
fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i % 251) as f32 - 125.0).collect()
}

fn halves(values: &[f32], encode: fn(f32) -> u16) -> Vec<u8> {
    values.iter().flat_map(|&v| encode(v).to_le_bytes()).collect()
}

/// All values of a matrix.
fn values(c: &Checkpoint, name: &str, rows: usize, cols: usize) -> (DType, Vec<f32>) {
    let matrix = c.matrix(name, rows, cols).unwrap();
    let mut all = vec![0.0; rows * cols];
    for (row, out) in all.chunks_exact_mut(cols).enumerate() {
        matrix.decode_row(row, out);
    }
    (matrix.dtype(), all)
}

#[test]
fn experts_are_slices_of_their_stack() {
    let stack = ramp(8 * 32 * 32);
    let model = Model::tiny().tensor("blk.1.ffn_gate_exps.weight", &[8, 32, 32], &stack).stored(
        "blk.1.ffn_down_exps.weight",
        DType::BF16,
        &[8, 32, 32],
        halves(&stack, f32_to_bf16),
    );
    let checkpoint = model.open().unwrap();
    let file = checkpoint.gguf().unwrap().tensor("blk.1.ffn_gate_exps.weight").unwrap().bytes;
    for expert in [0, 3, 7] {
        let name = |kind: &str| format!("model.layers.1.mlp.experts.{expert}.{kind}_proj.weight");
        let want = &stack[expert * 1024..][..1024];
        assert_eq!(values(&checkpoint, &name("gate"), 32, 32), (DType::F32, want.to_vec()));
        assert_eq!(values(&checkpoint, &name("down"), 32, 32), (DType::BF16, want.to_vec()));
        assert!(checkpoint.contains(&name("gate")) && !checkpoint.contains(&name("up")));
        // The bytes of the file themselves, not a copy.
        let slice = checkpoint.matrix(&name("gate"), 32, 32).unwrap();
        assert_eq!(slice.data().as_ptr(), file[expert * 4096..].as_ptr());
    }
}

#[test]
fn fused_experts_are_taken_apart() {
    let stack = ramp(8 * 64 * 32);
    let model = Model::tiny().less("blk.1.ffn_gate_exps.weight").tensor(
        "blk.1.ffn_gate_up_exps.weight",
        &[8, 64, 32],
        &stack,
    );
    let checkpoint = model.open().unwrap();
    for (kind, first) in [("gate", 0), ("up", 32)] {
        let name = format!("model.layers.1.mlp.experts.5.{kind}_proj.weight");
        let want = stack[(5 * 64 + first) * 32..][..1024].to_vec();
        assert_eq!(values(&checkpoint, &name, 32, 32), (DType::F32, want));
        assert!(checkpoint.contains(&name));
    }
}

const KV_B: &str = "model.layers.0.self_attn.kv_b_proj.weight";

/// `kv_b_proj` of the small model: 2 heads of 32 key and 2 value rows, 32 wide.
fn kv_b() -> Vec<f32> {
    ramp(2 * 34 * 32)
}

/// Its key rows, transposed head by head, and its value rows.
fn split_kv_b() -> (Vec<f32>, Vec<f32>) {
    let whole = kv_b();
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for head in whole.chunks_exact(34 * 32) {
        keys.extend((0..32 * 32).map(|i| head[i % 32 * 32 + i / 32]));
        values.extend_from_slice(&head[32 * 32..]);
    }
    (keys, values)
}

#[test]
fn kv_b_is_put_together_again() {
    let (keys, v) = split_kv_b();
    let (k_name, v_name) = ("blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight");
    let base = Model::tiny().tensor(k_name, &[2, 32, 32], &keys).tensor(v_name, &[2, 2, 32], &v);
    let f16 = |m: Model| {
        m.stored(k_name, DType::F16, &[2, 32, 32], halves(&keys, f32_to_f16)).stored(
            v_name,
            DType::F16,
            &[2, 2, 32],
            halves(&v, f32_to_f16),
        )
    };
    let bf16_keys = |m: Model| m.stored(k_name, DType::BF16, &[2, 32, 32], halves(&keys, f32_to_bf16));
    let legacy = base.clone().less(k_name).less(v_name).tensor("blk.0.attn_kv_b.weight", &[68, 32], &kv_b());
    for (model, dtype, made) in [
        (base.clone(), DType::F32, 68 * 32 * 4),
        (f16(base.clone()), DType::F16, 68 * 32 * 2),
        (bf16_keys(base), DType::F32, 68 * 32 * 4),
        (legacy, DType::F32, 0),
    ] {
        let checkpoint = model.open().unwrap();
        assert!(checkpoint.contains(KV_B));
        assert_eq!(values(&checkpoint, KV_B, 68, 32), (dtype, kv_b()));
        assert_eq!(checkpoint.made_bytes(), made);
        let parts = checkpoint.kv_b_parts(KV_B).unwrap();
        assert_eq!(parts.map(|p| p.map(|m| rows_of(&m))), (made > 0).then(|| [keys.clone(), v.clone()]));
    }
}

fn rows_of(m: &HostMatrix) -> Vec<f32> {
    let mut all = vec![0.0; m.rows() * m.cols()];
    all.chunks_exact_mut(m.cols()).enumerate().for_each(|(r, row)| m.decode_row(r, row));
    all
}

#[test]
fn quantised_parts_of_kv_b_become_halves() {
    // Blocks of d = 1 and whole numbers, which halves hold exactly.
    let blocks = |rows: usize| -> Vec<u8> {
        (0..rows).flat_map(|r| [0, 0x3c].into_iter().chain((0..32).map(move |i| (r + i) as u8))).collect()
    };
    let model = Model::tiny().stored("blk.0.attn_k_b.weight", DType::Q8_0, &[2, 32, 32], blocks(64)).stored(
        "blk.0.attn_v_b.weight",
        DType::Q8_0,
        &[2, 2, 32],
        blocks(4),
    );
    let checkpoint = model.open().unwrap();
    let (dtype, all) = values(&checkpoint, KV_B, 68, 32);
    assert_eq!((dtype, checkpoint.made_bytes()), (DType::F16, 68 * 32 * 2));
    for (i, &value) in all.iter().enumerate() {
        let (head, row, col) = (i / (34 * 32), i / 32 % 34, i % 32);
        let (block, element) = if row < 32 { (head * 32 + col, row) } else { (head * 2 + row - 32, col) };
        assert_eq!(value, f32::from(((block + element) as u8).cast_signed()), "value {i}");
    }
    let parts = checkpoint.kv_b_parts(KV_B).unwrap().unwrap();
    assert_eq!(parts.map(|m| (m.dtype(), m.rows(), m.cols())), [(DType::Q8_0, 64, 32), (DType::Q8_0, 4, 32)]);
}

#[test]
fn tensors_have_the_names_of_the_model() {
    let checkpoint = Model::tiny().open().unwrap();
    let names: Vec<String> = checkpoint.tensors().map(|t| t.model_name.into_owned()).collect();
    for name in [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.mlp.experts.gate_proj.weight",
        "model.layers.0.self_attn.k_b_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
    ] {
        assert!(names.iter().any(|n| n == name), "{name} is not in {names:?}");
    }
    let t = checkpoint.tensors().find(|t| t.name == "blk.1.ffn_gate_exps.weight").unwrap();
    assert_eq!((t.shape, t.dtype, t.bytes, t.parameters), (&[8, 32, 32][..], "F32", 32_768, 8192));
    assert_eq!(t.file, FILE);
    assert_eq!(checkpoint.vector("model.norm.weight", 32).unwrap()[31], 31.0 / 8.0);
    assert!(checkpoint.file("config.json").is_none());
}

#[test]
fn what_is_written_is_read() {
    let mut writer = GgufWriter::new();
    writer.set("general.alignment", 64u32).unwrap();
    let values: [(&str, Value); 12] = [
        ("u8", Value::U8(200)),
        ("i8", Value::I8(-100)),
        ("u16", Value::U16(60_000)),
        ("i16", Value::I16(-30_000)),
        ("u32", Value::U32(u32::MAX)),
        ("i32", Value::I32(i32::MIN)),
        ("u64", Value::U64(1 << 40)),
        ("i64", Value::I64(-(1 << 40))),
        ("f32", Value::F32(0.1)),
        ("f64", Value::F64(1e-300)),
        ("bool", Value::Bool(true)),
        ("text", Value::Text("Ünï\0code".into())),
    ];
    for (key, value) in &values {
        writer.set(key, value.clone()).unwrap();
    }
    writer.set("list", Array::f32s(&[1.5])).unwrap();
    let types = oxseek_weights::gguf::GgmlType::all().filter(|t| t.dtype().is_some());
    let types: Vec<_> = types.collect();
    for (i, t) in types.iter().enumerate() {
        writer.tensor(&format!("t{i}"), *t, &[1 + i, 2, 256]).unwrap();
    }
    let mut body = writer.begin(Vec::new()).unwrap();
    let data = |i: usize| {
        let bytes = types[i].block_bytes() * (1 + i) * 2 * 256 / types[i].block_len();
        (0..bytes).map(|n| (n * 7 + i) as u8).collect::<Vec<_>>()
    };
    let all: Vec<u8> = (0..types.len()).flat_map(data).collect();
    for piece in all.chunks(1000) {
        body.write(piece).unwrap();
    }
    let file = body.finish().unwrap();
    assert_eq!(file.len() % 64, 0);
    let read = Gguf::from_files(vec![(FILE.into(), ByteRegion::from_vec(file))]).unwrap();
    for (key, value) in &values {
        assert_eq!(format!("{:?}", read.get(key).unwrap()), format!("{value:?}"));
    }
    assert_eq!(read.metadata().count(), values.len() + 2);
    assert_eq!(read.tensors().count(), types.len());
    for (i, kind) in types.iter().enumerate() {
        let t = read.tensor(&format!("t{i}")).unwrap();
        assert_eq!((t.kind, t.shape, t.bytes), (*kind, &[1 + i, 2, 256][..], data(i).as_slice()));
    }
}

#[test]
fn version_2_and_lists_of_any_kind_are_read() {
    let keys = [
        key(b"general.architecture", 8, &text(b"other")),
        key(b"a", 9, &list(0, 3, &[1, 2, 3])),
        key(b"b", 9, &list(7, 2, &[1, 0])),
        key(b"c", 9, &list(12, 1, &[0; 8])),
        key(b"d", 9, &list(8, 0, &[])),
    ];
    let file = [common::gguf::head(2, 0, keys.len() as u64), keys.concat()].concat();
    let read = Gguf::from_files(vec![(FILE.into(), ByteRegion::from_vec(file.clone()))]).unwrap();
    let array = |key: &str| read.get(key).and_then(Value::as_array).unwrap();
    assert_eq!(array("a").as_i64s().unwrap().collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!((array("b").len(), array("c").len(), array("d").is_empty()), (2, 1, true));
    assert!(open(file).unwrap_err().to_string().contains("supported is deepseek2"));
}

#[test]
fn a_model_in_parts_opens_by_any_of_them() {
    let folder = std::env::temp_dir().join(format!("oxseek-gguf-parts-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let whole = Model::tiny();
    let with_split = |mut m: Model, number: u16| {
        m = m.with("split.no", number).with("split.count", 3u16);
        m.with("split.tensors.count", whole.tensors.len() as i32)
    };
    for number in 0..3u16 {
        // As llama.cpp can: the first part has no tensors.
        let tensors = whole.tensors.iter().enumerate().filter(|(i, _)| i % 2 + 1 == number as usize);
        let mut part = Model { metadata: Vec::new(), tensors: tensors.map(|(_, t)| t.clone()).collect() };
        if number == 0 {
            part.metadata.clone_from(&whole.metadata);
        }
        let name = format!("m-{:05}-of-00003.gguf", number + 1);
        fs::write(folder.join(name), with_split(part, number).bytes()).unwrap();
    }
    for name in ["m-00001-of-00003.gguf", "m-00003-of-00003.gguf", ""] {
        let checkpoint = Checkpoint::open(&folder.join(name)).unwrap();
        assert_eq!(checkpoint.tensors().count(), whole.tensors.len());
        assert_eq!(checkpoint.config(), whole.open().unwrap().config());
        assert_eq!(checkpoint.gguf().unwrap().file(), "m-00001-of-00003.gguf");
        assert!(checkpoint.vector("model.norm.weight", 32).is_ok());
    }
    fs::remove_dir_all(&folder).unwrap();
}
