//! The decoders against gguf-py (`scripts/gguf-goldens.py`), bit by bit.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use oxseek_tensor::{ByteRegion, DType, HostMatrix};

const ELEMENTS: usize = 1024;

#[test]
fn every_block_format_decodes_to_the_bits_of_gguf_py() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/gguf_blocks");
    let mut formats = 0;
    for dtype in DType::ALL.into_iter().filter(|d| d.block_len() > 1 && *d != DType::INT4) {
        let file = std::fs::read(folder.join(format!("{dtype}.bin"))).unwrap();
        let (blocks, want) = file.split_at(dtype.row_bytes(ELEMENTS).unwrap());
        let w = HostMatrix::new(dtype, 1, ELEMENTS, ByteRegion::from_vec(blocks.to_vec()), None).unwrap();
        let mut found = vec![0.0; ELEMENTS];
        w.decode_row(0, &mut found);
        assert_eq!(want.len(), ELEMENTS * 4);
        for (i, (found, want)) in found.iter().zip(want.as_chunks().0).enumerate() {
            let want = f32::from_le_bytes(*want);
            assert_eq!(found.to_bits(), want.to_bits(), "{dtype} element {i}: {found}, not {want}");
        }
        formats += 1;
    }
    assert_eq!(formats, 13);
}
