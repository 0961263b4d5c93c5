//! How urgent a thread is to the operating system.

/// How much nicer a thread becomes: Linux gives it a quarter of a core that another one wants too.
#[cfg(target_os = "linux")]
const NICER: i32 = 5;

/// Other threads come before this one from now on, where the system has that for threads (Linux).
pub(crate) fn lower() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{getpriority_process, setpriority_process};
        // Linux keeps it by thread, whatever POSIX says of processes. Where it cannot be had, little is lost.
        let thread = Some(rustix::thread::gettid());
        if let Ok(nice) = getpriority_process(thread) {
            let _ = setpriority_process(thread, nice + NICER);
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn only_this_thread_is_lowered() {
        let nice = || {
            let thread = Some(rustix::thread::gettid());
            rustix::process::getpriority_process(thread).unwrap()
        };
        let before = nice();
        let lowered = std::thread::spawn(move || {
            lower();
            nice()
        });
        assert_eq!((lowered.join().unwrap(), nice()), ((before + NICER).min(19), before));
    }
}
