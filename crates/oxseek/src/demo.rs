//! The demo model inside the binary.

use std::sync::Arc;

use oxseek_tensor::ByteRegion;

/// What the demo model is called where a name is shown.
pub const NAME: &str = "oxseek-demo";

macro_rules! embedded {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_bytes!(concat!(
            env!("CARGO_MANIFEST_DIR"), "/../../models/oxseek-demo/", $name
        )).as_slice())),+]
    };
}

static FILES: &[(&str, &[u8])] = embedded![
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
];

/// Golden greedy text of the demo model, for `oxseek selftest`.
pub static GOLDEN: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../goldens/oxseek-demo.safetensors.gz"));

/// The demo model's files, straight out of the binary.
pub fn files() -> Vec<(String, ByteRegion)> {
    FILES.iter().map(|(name, bytes)| ((*name).to_string(), region(bytes))).collect()
}

/// Bytes of the binary as a region.
pub fn region(bytes: &'static [u8]) -> ByteRegion {
    struct Static(&'static [u8]);
    impl AsRef<[u8]> for Static {
        fn as_ref(&self) -> &[u8] {
            self.0
        }
    }
    ByteRegion::whole(Arc::new(Static(bytes)))
}
