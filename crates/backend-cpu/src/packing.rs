//! Packs weights in the background: the first token does not wait for it, and later ones run at full speed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use oxseek_tensor::{Error, HostMatrix};

use crate::{
    huge::Arena,
    numa::Nodes,
    packed::{Packed, PackedFormat},
};

/// How long packing waits after the last matrix was loaded if no step comes.
const START_AFTER: Duration = Duration::from_millis(250);

enum Message {
    Job(Job),
    /// The first step is over: what waited for it may begin.
    Begin,
}

struct Job {
    matrix: usize,
    stored: HostMatrix,
    format: PackedFormat,
}

/// A thread that packs matrices one after the other, but not while the first step runs.
pub(crate) struct Packer {
    nodes: Arc<Nodes>,
    running: Option<Running>,
    /// Matrices whose packed form has not come back yet.
    open: usize,
    first_step: FirstStep,
}

/// Where the first step after loading is.
#[derive(Default, PartialEq, Eq)]
enum FirstStep {
    #[default]
    None,
    Runs,
    Over,
}

struct Running {
    jobs: Option<Sender<Message>>,
    /// Whether the first step runs.
    hold: Arc<AtomicBool>,
    done: Receiver<(usize, Result<Packed, Error>)>,
    thread: JoinHandle<()>,
}

impl Packer {
    /// Packs for threads that are spread over these nodes.
    pub(crate) fn new(nodes: Arc<Nodes>) -> Self {
        Self { nodes, running: None, open: 0, first_step: FirstStep::None }
    }

    /// Packs `stored` some time later; [`Packer::take`] gives it back under the number `matrix`.
    pub(crate) fn push(
        &mut self,
        matrix: usize,
        stored: HostMatrix,
        format: PackedFormat,
    ) -> Result<(), Error> {
        let running = match self.running.take() {
            Some(running) if running.jobs.is_some() => running,
            _ => start(Arc::clone(&self.nodes))?,
        };
        let job = Message::Job(Job { matrix, stored, format });
        // A packer that died leaves the weights as they are: they compute just as well.
        let sent = running.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        self.open += usize::from(sent);
        self.running = Some(running);
        Ok(())
    }

    /// A step begins. The first one has the CPU for itself.
    pub(crate) fn step_begins(&mut self) {
        match (&self.first_step, &self.running) {
            (FirstStep::None, Some(running)) => {
                running.hold.store(true, Relaxed);
                self.first_step = FirstStep::Runs;
            }
            // Nobody has read what the first one computed.
            (FirstStep::Runs, _) => self.step_is_over(),
            _ => {}
        }
    }

    /// The results of a step were read.
    pub(crate) fn step_is_over(&mut self) {
        if self.first_step == FirstStep::Runs {
            self.first_step = FirstStep::Over;
            if let Some(running) = &self.running {
                running.hold.store(false, Relaxed);
                if let Some(jobs) = &running.jobs {
                    // One that has ended needs no word.
                    let _ = jobs.send(Message::Begin);
                }
            }
        }
    }

    /// What is packed by now; with `wait`, what comes next, until nothing is left.
    pub(crate) fn take(&mut self, wait: bool) -> Option<(usize, Packed)> {
        if let Some(running) = self.running.as_mut().filter(|_| wait) {
            // Nothing more will come, so it begins at once.
            running.jobs = None;
        }
        while self.open > 0 {
            let done = &self.running.as_ref()?.done;
            let next = if wait { done.recv().ok() } else { done.try_recv().ok() };
            let Some((matrix, packed)) = next else {
                self.open = if wait { 0 } else { self.open };
                return None;
            };
            self.open -= 1;
            // Without memory for it the stored form stays in use.
            if let Ok(packed) = packed {
                return Some((matrix, packed));
            }
        }
        None
    }
}

impl Drop for Packer {
    fn drop(&mut self) {
        if let Some(Running { jobs, done, thread, .. }) = self.running.take() {
            drop(jobs);
            // The thread stops at its next result, which nobody takes any more.
            drop(done);
            let _ = thread.join();
        }
    }
}

fn start(nodes: Arc<Nodes>) -> Result<Running, Error> {
    let (jobs, todo) = channel::<Message>();
    let (results, done) = channel();
    let hold = Arc::new(AtomicBool::new(false));
    let held = Arc::clone(&hold);
    let pack = move || {
        let mut queue = Vec::new();
        loop {
            match todo.recv_timeout(START_AFTER) {
                Ok(Message::Job(job)) => queue.push(job),
                Err(RecvTimeoutError::Timeout) if queue.is_empty() || held.load(Relaxed) => {}
                // The first step is over, or nothing came for a while, or nothing will come.
                Ok(Message::Begin) | Err(_) => break,
            }
        }
        let mut arena = Arena::default();
        let later = todo.into_iter().filter_map(|message| match message {
            Message::Job(job) => Some(job),
            Message::Begin => None,
        });
        for Job { matrix, stored, format } in queue.into_iter().chain(later) {
            let packed = Packed::new(&stored, format, &mut arena, &nodes);
            if packed.is_ok() {
                // From now on the packed form is read: without this, weights would lie in memory twice.
                stored.release();
            }
            if results.send((matrix, packed)).is_err() {
                return;
            }
        }
    };
    let failed = |e| Error::Device(format!("cannot start the packing thread: {e}"));
    let thread = std::thread::Builder::new().name("oxseek-pack".into()).spawn(pack).map_err(failed)?;
    Ok(Running { jobs: Some(jobs), hold, done, thread })
}

#[cfg(test)]
mod tests {
    use oxseek_tensor::{DType, conformance::Random};

    use super::*;
    use crate::numa::Topology;

    /// Waits for the next result without saying that nothing more will come.
    fn next(packer: &Packer) -> usize {
        packer.running.as_ref().unwrap().done.recv().unwrap().0
    }

    #[test]
    fn packing_goes_on_after_the_first_step_whether_it_was_read_or_not() {
        for read in [true, false] {
            let mut packer = Packer::new(Arc::new(Nodes::new(Topology::default(), 1)));
            let m = Random::new(1).matrix(DType::BF16, 20, 8).unwrap();
            packer.push(7, m.clone(), PackedFormat::Bf16).unwrap();
            packer.step_begins();
            assert!(packer.running.as_ref().unwrap().hold.load(Relaxed));
            if read {
                packer.step_is_over();
            } else {
                packer.step_begins();
            }
            assert!(!packer.running.as_ref().unwrap().hold.load(Relaxed));
            assert_eq!(next(&packer), 7);
            // Later steps hold nothing up.
            packer.step_begins();
            packer.push(8, m, PackedFormat::Bf16).unwrap();
            assert_eq!(next(&packer), 8);
        }
    }
}
