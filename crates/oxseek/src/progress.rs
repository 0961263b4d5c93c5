//! Progress bars of commands that write files.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar of `bytes` bytes on standard error; without a terminal it shows nothing.
pub fn bytes_bar(what: &'static str, bytes: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
    let template = "{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.with_message(what)
}
