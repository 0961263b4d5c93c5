//! A persistent pool of threads that forks and joins once per op.
//!
//! Tasks are claimed from a counter, so a slow or sleeping thread only does fewer of them: a fork never waits for a
//! thread to wake up, only for those that have begun to work. That keeps 8 threads on 2 cores from crawling.
#![allow(unsafe_code, reason = "a job's closure is lent to other threads for the time of one fork")]

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

use oxseek_tensor::Error;

/// How long an idle worker looks for work before it sleeps: longer than the gaps between the ops of a step.
const SPIN: Duration = Duration::from_micros(60);
/// Looks at the counter between two looks at the clock.
const SPIN_ROUNDS: usize = 64;

/// One fork: `work(task, thread)` for every task below `tasks`.
struct Job<'a> {
    work: &'a (dyn Fn(usize, usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    panicked: AtomicBool,
}

/// Seen by all threads.
struct Shared {
    /// The open job, or null.
    job: AtomicPtr<Job<'static>>,
    /// Workers that may hold a reference to the open job.
    inside: AtomicUsize,
    /// Counts forks, so that a worker knows a new one from the one it left.
    forks: AtomicUsize,
    asleep: Vec<AtomicBool>,
    stop: AtomicBool,
}

/// Threads that wait for forks. The thread that forks works too, as thread 0.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Thread>,
    handles: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads, the calling one included.
    pub(crate) fn new(threads: usize) -> Result<Self, Error> {
        let shared = Arc::new(Shared {
            job: AtomicPtr::new(std::ptr::null_mut()),
            inside: AtomicUsize::new(0),
            forks: AtomicUsize::new(0),
            asleep: (1..threads.max(1)).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        });
        let mut pool = Self { shared, workers: Vec::new(), handles: Vec::new() };
        for worker in 0..pool.shared.asleep.len() {
            let shared = Arc::clone(&pool.shared);
            let handle = thread::Builder::new()
                .name(format!("oxseek-cpu-{}", worker + 1))
                .spawn(move || work_until_stopped(&shared, worker))
                .map_err(|e| Error::Device(format!("cannot start thread {}: {e}", worker + 1)))?;
            pool.workers.push(handle.thread().clone());
            pool.handles.push(handle);
        }
        Ok(pool)
    }

    /// Threads, the calling one included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `work(task, thread)` for every task below `tasks`, on all threads, and waits for the end. A thread
    /// number is below [`Pool::threads`] and runs one task at a time.
    ///
    /// # Errors
    /// [`Error::Device`] when a task panicked; the others have run.
    pub(crate) fn run(&mut self, tasks: usize, work: &(dyn Fn(usize, usize) + Sync)) -> Result<(), Error> {
        let job = Job { work, tasks, next: AtomicUsize::new(0), panicked: AtomicBool::new(false) };
        if tasks > 1 && !self.workers.is_empty() {
            self.open(&job);
            claim_tasks(&job, 0);
            self.close();
        } else {
            claim_tasks(&job, 0);
        }
        if job.panicked.load(SeqCst) {
            return Err(Error::Device("a CPU kernel panicked; the step is lost".into()));
        }
        Ok(())
    }

    fn open(&self, job: &Job<'_>) {
        // The pointer is only followed between `open` and `close`, while `job` is alive: `close` waits for every
        // worker that has announced itself, and one that comes later finds null.
        let job = std::ptr::from_ref(job).cast_mut().cast::<Job<'static>>();
        self.shared.job.store(job, SeqCst);
        self.shared.forks.fetch_add(1, SeqCst);
        for (asleep, worker) in self.shared.asleep.iter().zip(&self.workers) {
            if asleep.swap(false, SeqCst) {
                worker.unpark();
            }
        }
    }

    fn close(&self) {
        self.shared.job.store(std::ptr::null_mut(), SeqCst);
        let mut looks = 0usize;
        while self.shared.inside.load(SeqCst) > 0 {
            looks += 1;
            // A worker that lost its core needs ours to finish.
            if looks.is_multiple_of(1024) { thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        self.workers.iter().for_each(Thread::unpark);
        for handle in self.handles.drain(..) {
            // A worker catches its panics; if one died all the same there is nobody left to tell.
            let _ = handle.join();
        }
    }
}

fn claim_tasks(job: &Job<'_>, thread: usize) {
    loop {
        let task = job.next.fetch_add(1, SeqCst);
        if task >= job.tasks {
            return;
        }
        if catch_unwind(AssertUnwindSafe(|| (job.work)(task, thread))).is_err() {
            job.panicked.store(true, SeqCst);
        }
    }
}

fn work_until_stopped(shared: &Shared, worker: usize) {
    let mut seen = 0;
    while !shared.stop.load(SeqCst) {
        let forks = shared.forks.load(SeqCst);
        if forks == seen {
            wait_for_fork(shared, worker, seen);
            continue;
        }
        seen = forks;
        shared.inside.fetch_add(1, SeqCst);
        let job = shared.job.load(SeqCst);
        if !job.is_null() {
            // SAFETY: `inside` was raised before `job` was read, both sequentially consistent. If the pointer is not
            // null, `close` has not yet taken it down, and it will wait for `inside` to fall before the job dies.
            claim_tasks(unsafe { &*job }, worker + 1);
        }
        shared.inside.fetch_sub(1, SeqCst);
    }
}

fn wait_for_fork(shared: &Shared, worker: usize, seen: usize) {
    let since = Instant::now();
    while since.elapsed() < SPIN {
        for _ in 0..SPIN_ROUNDS {
            if shared.forks.load(SeqCst) != seen {
                return;
            }
            std::hint::spin_loop();
        }
    }
    shared.asleep[worker].store(true, SeqCst);
    // A fork or a stop that came before the flag was up did not wake us: look once more before sleeping.
    if shared.forks.load(SeqCst) == seen && !shared.stop.load(SeqCst) {
        thread::park();
    }
    shared.asleep[worker].store(false, SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let mut pool = Pool::new(threads).unwrap();
            for tasks in [0, 1, 2, 7, 100] {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|task, thread| {
                    assert!(thread < threads);
                    runs[task].fetch_add(1, SeqCst);
                })
                .unwrap();
                assert!(runs.iter().all(|r| r.load(SeqCst) == 1));
            }
        }
    }

    #[test]
    fn more_threads_than_cores_do_not_hang() {
        let mut pool = Pool::new(16).unwrap();
        let sum = AtomicUsize::new(0);
        for _ in 0..20_000 {
            pool.run(4, &|task, _| {
                sum.fetch_add(task, SeqCst);
            })
            .unwrap();
        }
        assert_eq!(sum.load(SeqCst), 20_000 * 6);
    }

    #[test]
    fn a_sleeping_pool_wakes_up() {
        let mut pool = Pool::new(4).unwrap();
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(2));
            let runs = AtomicUsize::new(0);
            pool.run(64, &|_, _| {
                runs.fetch_add(1, SeqCst);
            })
            .unwrap();
            assert_eq!(runs.load(SeqCst), 64);
        }
    }

    #[test]
    fn a_panic_is_an_error_and_the_pool_lives_on() {
        let mut pool = Pool::new(3).unwrap();
        let result = pool.run(10, &|task, _| assert!(task != 5, "this panic is part of the test"));
        assert!(matches!(result, Err(Error::Device(_))));
        pool.run(10, &|_, _| {}).unwrap();
    }
}
