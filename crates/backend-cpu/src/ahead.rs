//! Weights that are left in mapped files: the disk is told in time what will be needed.
#![allow(unsafe_code, reason = "gives the system advice about pages")]

/// Asks for the pages of `bytes`, which a file backs. It returns while the disk works, and threads that come to a page
/// too early wait for it as they would have without. Advice changes no byte, and one that is refused is none.
#[cfg(unix)]
pub(crate) fn will_need(bytes: &[u8]) {
    let page = rustix::param::page_size();
    let before = bytes.as_ptr().addr() % page;
    let start = bytes.as_ptr().wrapping_sub(before).cast_mut().cast();
    // SAFETY: the pages hold these bytes, so they are mapped; this advice only reads them in.
    let _ = unsafe { rustix::mm::madvise(start, bytes.len() + before, rustix::mm::Advice::WillNeed) };
}

/// Other systems read pages when they are touched.
#[cfg(not(unix))]
pub(crate) fn will_need(_bytes: &[u8]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_may_be_asked_for() {
        let bytes: Vec<u8> = (0..100_000).map(|i| i as u8).collect();
        for range in [0..0, 1..2, 4095..4097, 1..100_000] {
            will_need(&bytes[range]);
        }
        assert!(bytes.iter().enumerate().all(|(i, b)| *b == i as u8));
    }
}
