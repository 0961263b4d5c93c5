//! Masks of constrained answers, made beside the forward.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc,
};

use crate::{Allowed, Constraint, TokenMask, scheduler::SequenceId};

/// A constraint with the memory for its masks.
pub(crate) struct Guide {
    constraint: Box<dyn Constraint>,
    pub(crate) mask: TokenMask,
    pub(crate) allowed: Allowed,
}

impl Guide {
    pub(crate) fn new(constraint: Box<dyn Constraint>, vocab: usize) -> Self {
        Self { constraint, mask: TokenMask::new(vocab), allowed: Allowed::Any }
    }

    /// Finds out what may come next.
    fn look(&mut self) -> Result<(), String> {
        self.mask.clear();
        self.allowed = self.constraint.allowed(&mut self.mask)?;
        Ok(())
    }

    pub(crate) fn commit(&mut self, token: u32) -> Result<(), String> {
        self.constraint.commit(token)
    }
}

type Job = (SequenceId, Guide);
type Outcome = (SequenceId, Result<Guide, String>);

/// The thread that makes masks. It begins with the first constrained answer.
pub(crate) struct Masks {
    jobs: Option<mpsc::Sender<Job>>,
    outcomes: (mpsc::Sender<Outcome>, mpsc::Receiver<Outcome>),
    open: usize,
}

impl Masks {
    pub(crate) fn new() -> Self {
        Self { jobs: None, outcomes: mpsc::channel(), open: 0 }
    }

    /// Begins to make the mask of a sequence's next token.
    pub(crate) fn begin(&mut self, sequence: SequenceId, guide: Guide) {
        self.open += 1;
        if self.jobs.is_none() {
            self.jobs = start(self.outcomes.0.clone());
        }
        let job = (sequence, guide);
        // Without a thread the mask is made in place.
        let left = match &self.jobs {
            Some(jobs) => jobs.send(job).err().map(|e| e.0),
            None => Some(job),
        };
        if let Some(job) = left {
            // The receiver is in `self`, so this arrives.
            let _ = self.outcomes.0.send(run(job));
        }
    }

    /// Waits for one mask that was begun; None when all are there.
    pub(crate) fn next(&mut self) -> Option<Outcome> {
        self.open = self.open.checked_sub(1)?;
        self.outcomes.1.recv().ok()
    }
}

fn start(outcomes: mpsc::Sender<Outcome>) -> Option<mpsc::Sender<Job>> {
    let (jobs, inbox) = mpsc::channel::<Job>();
    let work = move || {
        for job in inbox {
            if outcomes.send(run(job)).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("masks".into()).spawn(work).ok().map(|_| jobs)
}

fn run((sequence, mut guide): Job) -> Outcome {
    let looked = catch_unwind(AssertUnwindSafe(|| guide.look()));
    let looked = looked.unwrap_or_else(|_: Box<dyn Any + Send>| {
        Err("the constraint on the answer met an internal error".into())
    });
    (sequence, looked.map(|()| guide))
}
