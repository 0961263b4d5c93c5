//! Which rows attend in which form.
//!
//! Absorbed and expanded attention differ in the last bits of F32. So that a request's text never depends on
//! its neighbours in the batch, the form of a row is a function of its position and of its own prompt length
//! alone, not of how the scheduler happened to cut the prompt: a prompt is divided into cells of
//! [`CELL_TOKENS`], and each cell has one form.

use oxseek_tensor::backend::{AttendMode, BLOCK_TOKENS, MlaShape, Segment, StepInput};

use crate::Batch;

/// Tokens of a prompt that share one form of attention.
const CELL_TOKENS: usize = 256;

/// The form of the row at `position` of a sequence with a prompt of `prompt` tokens.
fn mode_of(shape: &MlaShape, position: usize, prompt: usize) -> AttendMode {
    if position >= prompt {
        return AttendMode::Absorbed;
    }
    let start = position / CELL_TOKENS * CELL_TOKENS;
    let rows = CELL_TOKENS.min(prompt - start);
    // Multiply-adds per head for the cell; expanded rows are made anew per step. Those of absorbed rows take a quarter
    // longer (bench/NOTES.md): a tile of expanded ones has more queries for a key.
    let keys = start + rows / 2;
    let expansion = shape.latent * (shape.nope + shape.value);
    let expanded = rows * keys * (shape.nope + shape.rope + shape.value) + (start + rows) * expansion;
    let absorbed = rows * keys * (2 * shape.latent + shape.rope) + rows * expansion;
    if 4 * expanded < 5 * absorbed { AttendMode::Expanded } else { AttendMode::Absorbed }
}

/// How many of the rows of a block are expanded; they are its first ones. All of a block lies in one cell, so beside
/// its tokens and what came before this is all that its bits depend on.
pub(super) fn expanded_rows(shape: &MlaShape, block: usize, prompt: usize) -> u8 {
    let start = block * BLOCK_TOKENS;
    match mode_of(shape, start, prompt) {
        AttendMode::Expanded => BLOCK_TOKENS.min(prompt - start) as u8,
        AttendMode::Absorbed => 0,
    }
}

/// Turns a batch into a backend's step: tokens and block tables as they are, sequences cut where the form changes.
pub(super) fn step_input(shape: &MlaShape, batch: &Batch, step: &mut StepInput) {
    step.tokens.clone_from(&batch.tokens);
    step.blocks.clone_from(&batch.blocks);
    step.segments.clear();
    for s in &batch.sequences {
        let (mut row, end) = (s.tokens.start, s.tokens.end);
        while row < end {
            let start = s.start + (row - s.tokens.start);
            let mode = mode_of(shape, start, s.prompt_tokens);
            let mut rows = 1;
            while row + rows < end && mode_of(shape, start + rows, s.prompt_tokens) == mode {
                rows += 1;
            }
            step.segments.push(Segment { row, rows, start, first_block: s.blocks.start, mode });
            row += rows;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LogitRows;

    const SHAPE: MlaShape =
        MlaShape { heads: 6, nope: 64, rope: 32, value: 64, latent: 128, softmax_scale: 1.0 };

    fn modes(cuts: &[usize]) -> Vec<AttendMode> {
        let mut modes = Vec::new();
        let mut step = StepInput::default();
        for w in cuts.windows(2) {
            let mut batch = Batch::default();
            batch.push(&vec![0; w[1] - w[0]], w[0], 600, &[0; 16], LogitRows::None);
            step_input(&SHAPE, &batch, &mut step);
            for s in &step.segments {
                modes.extend(vec![s.mode; s.rows]);
            }
        }
        modes
    }

    #[test]
    fn a_block_has_one_form_up_to_the_end_of_the_prompt() {
        for prompt in (1..1400).step_by(7) {
            for block in 0..25 {
                let rows = (block * BLOCK_TOKENS..).take(BLOCK_TOKENS);
                let modes: Vec<AttendMode> = rows.map(|p| mode_of(&SHAPE, p, prompt)).collect();
                let expanded = usize::from(expanded_rows(&SHAPE, block, prompt));
                let (first, rest) = modes.split_at(expanded);
                assert!(first.iter().all(|m| *m == AttendMode::Expanded), "{prompt}, {block}");
                assert!(rest.iter().all(|m| *m == AttendMode::Absorbed), "{prompt}, {block}");
            }
        }
    }

    #[test]
    fn the_form_does_not_depend_on_the_cut() {
        let whole = modes(&[0, 700]);
        assert_eq!(whole.len(), 700);
        assert_eq!(whole, modes(&[0, 1, 2, 200, 256, 257, 511, 600, 601, 700]));
        assert_eq!(whole[0], AttendMode::Expanded);
        assert_eq!(whole[600], AttendMode::Absorbed);
    }
}
