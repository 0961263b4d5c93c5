//! Packs weights in the background: the first token does not wait for it, and later ones run at full speed.

use std::{
    sync::{
        Arc,
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

/// How long packing waits after the last matrix was loaded: a first token usually comes in less.
const START_AFTER: Duration = Duration::from_millis(250);

struct Job {
    matrix: usize,
    stored: HostMatrix,
    format: PackedFormat,
}

/// A thread that packs matrices one after the other.
pub(crate) struct Packer {
    nodes: Arc<Nodes>,
    running: Option<Running>,
    /// Matrices whose packed form has not come back yet.
    open: usize,
}

struct Running {
    jobs: Option<Sender<Job>>,
    done: Receiver<(usize, Result<Packed, Error>)>,
    thread: JoinHandle<()>,
}

impl Packer {
    /// Packs for threads that are spread over these nodes.
    pub(crate) fn new(nodes: Arc<Nodes>) -> Self {
        Self { nodes, running: None, open: 0 }
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
        let job = Job { matrix, stored, format };
        // A packer that died leaves the weights as they are: they compute just as well.
        let sent = running.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        self.open += usize::from(sent);
        self.running = Some(running);
        Ok(())
    }

    /// Whether matrices are still to be packed.
    pub(crate) fn is_open(&self) -> bool {
        self.open > 0
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
        if let Some(Running { jobs, done, thread }) = self.running.take() {
            drop(jobs);
            // The thread stops at its next result, which nobody takes any more.
            drop(done);
            let _ = thread.join();
        }
    }
}

fn start(nodes: Arc<Nodes>) -> Result<Running, Error> {
    let (jobs, todo) = channel::<Job>();
    let (results, done) = channel();
    let pack = move || {
        let mut queue = Vec::new();
        loop {
            match todo.recv_timeout(START_AFTER) {
                Ok(job) => queue.push(job),
                Err(RecvTimeoutError::Timeout) if queue.is_empty() => {}
                // Nothing came for a while, or nothing will come.
                Err(_) => break,
            }
        }
        let mut arena = Arena::default();
        for Job { matrix, stored, format } in queue.into_iter().chain(todo) {
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
    Ok(Running { jobs: Some(jobs), done, thread })
}
