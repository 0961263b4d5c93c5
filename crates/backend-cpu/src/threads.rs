//! A persistent pool of threads that forks and joins once per op.
//!
//! Each thread has a share of the tasks that follow each other, so that what it reads is one stream of memory. Tasks
//! are claimed from the share's counter, by others too once they have none left: a slow or sleeping thread only does
//! fewer of them, and a fork never waits for a thread to wake up, only for those that have begun to work. That keeps 8
//! threads on 2 cores from crawling.
#![allow(unsafe_code, reason = "a job's closure is lent to other threads for the time of one fork")]

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, JoinHandle, Thread, ThreadId},
    time::{Duration, Instant},
};

use oxseek_tensor::Error;

use crate::numa::{Nodes, Topology};

/// How long an idle worker looks for work before it sleeps: longer than the gaps between the ops of a step.
const SPIN: Duration = Duration::from_micros(60);
/// Looks at the counter between two looks at the clock.
const SPIN_ROUNDS: usize = 64;
/// Looks at the workers that are still inside, before the core is offered to one of them.
const YIELD_ROUNDS: usize = 128;

/// One fork: `work(task, thread)` for every task below `tasks`.
struct Job<'a> {
    work: &'a (dyn Fn(usize, usize) + Sync),
    /// What is left of each thread's share.
    claims: &'a [Claims],
    nodes: &'a Nodes,
    panicked: AtomicBool,
}

/// The tasks of a thread, claimed from a counter. Counters of two threads share no cache line.
#[repr(align(128))]
#[derive(Default)]
struct Claims {
    next: AtomicUsize,
    end: AtomicUsize,
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
    nodes: Arc<Nodes>,
    claims: Vec<Claims>,
    /// The thread that forks, once it has been pinned.
    forking: Option<ThreadId>,
}

impl Pool {
    /// A pool of `threads` threads, the one that will fork included, spread over the nodes of `topology`.
    pub(crate) fn new(threads: usize, topology: Topology) -> Result<Self, Error> {
        let nodes = Arc::new(Nodes::new(topology, threads.max(1)));
        let shared = Arc::new(Shared {
            job: AtomicPtr::new(std::ptr::null_mut()),
            inside: AtomicUsize::new(0),
            forks: AtomicUsize::new(0),
            asleep: (1..threads.max(1)).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        });
        let claims = (0..threads.max(1)).map(|_| Claims::default()).collect();
        let mut pool =
            Self { shared, workers: Vec::new(), handles: Vec::new(), nodes, claims, forking: None };
        for worker in 0..pool.shared.asleep.len() {
            let (shared, nodes) = (Arc::clone(&pool.shared), Arc::clone(&pool.nodes));
            let handle = thread::Builder::new()
                .name(format!("oxseek-cpu-{}", worker + 1))
                .spawn(move || {
                    nodes.enter(nodes.of_thread(worker + 1));
                    work_until_stopped(&shared, worker);
                })
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
        self.pin_forking();
        for (thread, claims) in self.claims.iter().enumerate() {
            let share = self.nodes.share(thread, tasks);
            claims.next.store(share.start, SeqCst);
            claims.end.store(share.end, SeqCst);
        }
        let job = Job { work, claims: &self.claims, nodes: &self.nodes, panicked: AtomicBool::new(false) };
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

    /// The nodes that its threads are spread over.
    pub(crate) fn nodes(&self) -> &Arc<Nodes> {
        &self.nodes
    }

    /// The pool may be made by another thread than the one that forks, so that one is pinned when it first does.
    fn pin_forking(&mut self) {
        if self.nodes.count() > 1 && self.forking != Some(thread::current().id()) {
            self.nodes.enter(0);
            self.forking = Some(thread::current().id());
        }
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
            // A worker that lost its core needs ours to finish; one that has it is done in a moment.
            if looks.is_multiple_of(YIELD_ROUNDS) { thread::yield_now() } else { std::hint::spin_loop() }
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

/// Runs tasks until none is left: the thread's own, then those of its node, then those of others.
fn claim_tasks(job: &Job<'_>, thread: usize) {
    for owner in job.nodes.nearest(thread) {
        let claims = &job.claims[owner];
        let end = claims.end.load(SeqCst);
        // Looking is cheaper than claiming, and most shares of others are empty when a thread has done its own.
        while claims.next.load(SeqCst) < end {
            let task = claims.next.fetch_add(1, SeqCst);
            if task >= end {
                break;
            }
            if catch_unwind(AssertUnwindSafe(|| (job.work)(task, thread))).is_err() {
                job.panicked.store(true, SeqCst);
            }
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
    use crate::numa::tests::two_nodes;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let mut pool = Pool::new(threads, Topology::default()).unwrap();
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
    fn every_task_runs_once_on_two_nodes() {
        for (threads, first, second) in [(2, 1, 1), (5, 3, 2), (8, 2, 6)] {
            let mut pool = Pool::new(threads, two_nodes(first, second)).unwrap();
            assert_eq!(pool.nodes().count(), 2);
            for tasks in [0, 1, 2, 7, 100] {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|task, thread| {
                    assert!(thread < threads);
                    runs[task].fetch_add(1, SeqCst);
                })
                .unwrap();
                assert!(runs.iter().all(|r| r.load(SeqCst) == 1), "{threads} threads, {tasks} tasks");
            }
        }
    }

    #[test]
    fn more_threads_than_cores_do_not_hang() {
        let mut pool = Pool::new(16, Topology::default()).unwrap();
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
        let mut pool = Pool::new(4, Topology::default()).unwrap();
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
        let mut pool = Pool::new(3, Topology::default()).unwrap();
        let result = pool.run(10, &|task, _| assert!(task != 5, "this panic is part of the test"));
        assert!(matches!(result, Err(Error::Device(_))));
        pool.run(10, &|_, _| {}).unwrap();
    }
}
