//! How urgent a thread is to the operating system.

#[cfg(target_os = "linux")]
use rustix::process::{Pid, getpriority_process, setpriority_process};

/// A thread whose urgency can be lowered, where the system has that for threads (Linux); elsewhere it stays.
pub(crate) struct Urgency {
    #[cfg(target_os = "linux")]
    thread: Pid,
}

/// How much nicer a thread becomes: Linux gives it a quarter of a core that another one wants too.
#[cfg(target_os = "linux")]
const NICER: i32 = 5;

impl Urgency {
    pub(crate) fn of_this_thread() -> Self {
        Self {
            #[cfg(target_os = "linux")]
            thread: rustix::thread::gettid(),
        }
    }

    /// Other threads come first from now on. A thread that ended meanwhile is none to lower.
    pub(crate) fn lower(&self) {
        #[cfg(target_os = "linux")]
        // Linux keeps it by thread, whatever POSIX says of processes. Where it cannot be had, little is lost.
        if let Ok(nice) = getpriority_process(Some(self.thread)) {
            let _ = setpriority_process(Some(self.thread), nice + NICER);
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::{sync::mpsc, thread};

    #[test]
    fn only_that_thread_is_lowered() {
        let nice = || getpriority_process(Some(rustix::thread::gettid())).unwrap();
        let before = nice();
        let (send, receive) = mpsc::channel();
        let (lowered, wait) = mpsc::channel();
        let thread = thread::spawn(move || {
            send.send(Urgency::of_this_thread()).unwrap();
            wait.recv().unwrap();
            nice()
        });
        receive.recv().unwrap().lower();
        lowered.send(()).unwrap();
        assert_eq!((thread.join().unwrap(), nice()), ((before + NICER).min(19), before));
    }
}
