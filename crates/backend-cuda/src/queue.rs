//! Kernels that wait to be launched, and steps that are launched as one graph.
//!
//! Ops only note what is to run. When a result is wanted the whole list goes to the device. A list that came before,
//! word by word, is kept as a CUDA graph: one call instead of hundreds. That works because ops name only buffers made
//! at start, and all that changes from step to step lies in memory that `begin_step` fills.

use std::{
    collections::HashMap,
    ffi::c_void,
    hash::{BuildHasherDefault, Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use oxseek_tensor::Error;

use crate::{
    device::Device,
    driver::{DevicePtr, Graph, Pinned, Stream},
    kernels::Kernel,
};

/// Shorter lists are launched as they are.
const GRAPH_LAUNCHES_MIN: usize = 8;
/// Graphs that are kept; what comes later is launched kernel by kernel.
const GRAPHS_MAX: usize = 64;
/// Lists that were seen once and are remembered.
const SEEN_MAX: usize = 1024;
/// Without asking a kernel gets so much shared memory beside what it declares itself.
const SHARED_BYTES_USUAL: u32 = 32 << 10;

/// One argument of a kernel: whole words of eight bytes; a shorter value lies in the low bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Argument {
    Word(u64),
    /// A struct that is passed by value.
    Words([u64; 4]),
}

impl From<DevicePtr> for Argument {
    fn from(v: DevicePtr) -> Self {
        Self::Word(v)
    }
}
impl From<usize> for Argument {
    fn from(v: usize) -> Self {
        Self::Word(v as u64)
    }
}
impl From<bool> for Argument {
    fn from(v: bool) -> Self {
        Self::Word(u64::from(v))
    }
}
impl From<f32> for Argument {
    fn from(v: f32) -> Self {
        Self::Word(u64::from(v.to_bits()))
    }
}
impl From<[u64; 4]> for Argument {
    fn from(v: [u64; 4]) -> Self {
        Self::Words(v)
    }
}

/// `arguments![a, b]`: what a kernel is launched with.
macro_rules! arguments {
    ($($value:expr),* $(,)?) => { &[$($crate::queue::Argument::from($value)),*] };
}
pub(crate) use arguments;

/// How many blocks of how many threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    pub(crate) shared: u32,
    /// Blocks that read each other's shared memory.
    pub(crate) cluster: u32,
}

impl Shape {
    pub(crate) fn new(grid: [usize; 3], block: u32) -> Self {
        Self { grid: grid.map(|n| n as u32), block, shared: 0, cluster: 1 }
    }

    /// With bytes of dynamic shared memory.
    pub(crate) fn shared(self, bytes: usize) -> Self {
        Self { shared: bytes as u32, ..self }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Launch {
    kernel: Kernel,
    shape: Shape,
    /// Where the words of this launch, and the beginnings of its arguments, end.
    words_end: usize,
    starts_end: usize,
}

/// Launches in order, their arguments in two lists.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct List {
    launches: Vec<Launch>,
    words: Vec<u64>,
    /// Index in `words` of each argument.
    starts: Vec<usize>,
}

/// Only of the arguments: steps that differ, differ there. All else is compared.
impl Hash for List {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.words.iter().for_each(|w| state.write_u64(*w));
    }
}

/// The hash of a list: a multiplication per word, for a step has thousands. Nobody outside chooses the words.
#[derive(Default)]
struct WordHasher(u64);

impl Hasher for WordHasher {
    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u64(u64::from(*b)));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl List {
    fn clear(&mut self) {
        self.launches.clear();
        self.words.clear();
        self.starts.clear();
    }
}

/// What waits to run on one stream.
pub(crate) struct Queue {
    device: Arc<Device>,
    stream: Stream,
    waiting: List,
    seen: HashMap<List, Option<Graph>, BuildHasherDefault<WordHasher>>,
    graphs: usize,
    /// Where results come back to.
    pinned: Option<Pinned>,
    shared_allowed: HashMap<Kernel, u32>,
    failed: Option<Error>,
    waited: Arc<AtomicU64>,
}

impl Queue {
    pub(crate) fn new(device: Arc<Device>) -> Result<Self, Error> {
        let stream = device.driver.stream()?;
        Ok(Self {
            device,
            stream,
            waiting: List::default(),
            seen: HashMap::default(),
            graphs: 0,
            pinned: None,
            shared_allowed: HashMap::new(),
            failed: None,
            waited: Arc::default(),
        })
    }

    /// Notes a launch.
    pub(crate) fn push(&mut self, kernel: Kernel, shape: Shape, arguments: &[Argument]) {
        if shape.grid.contains(&0) {
            return;
        }
        if shape.shared > SHARED_BYTES_USUAL {
            self.allow_shared(kernel, shape.shared);
        }
        let list = &mut self.waiting;
        for a in arguments {
            list.starts.push(list.words.len());
            match a {
                Argument::Word(w) => list.words.push(*w),
                Argument::Words(w) => list.words.extend(w),
            }
        }
        let (words_end, starts_end) = (list.words.len(), list.starts.len());
        list.launches.push(Launch { kernel, shape, words_end, starts_end });
    }

    /// Shape and words of the launch that waits last, if it is of `kernel`: an op may do its work along with its own.
    pub(crate) fn last(&self, kernel: Kernel) -> Option<(Shape, &[u64])> {
        self.nth_last(0, kernel)
    }

    /// The same of the launch with `behind` launches behind it.
    pub(crate) fn nth_last(&self, behind: usize, kernel: Kernel) -> Option<(Shape, &[u64])> {
        let list = &self.waiting;
        let at = list.launches.len().checked_sub(behind + 1)?;
        let (found, before) = (&list.launches[at], &list.launches[..at]);
        let first = before.last().map_or(0, |l| l.words_end);
        (found.kernel == kernel).then(|| (found.shape, &list.words[first..found.words_end]))
    }

    /// Takes the launch that waits last out of the line.
    pub(crate) fn take_last(&mut self) {
        let list = &mut self.waiting;
        list.launches.pop();
        let ends = list.launches.last().map_or((0, 0), |l| (l.words_end, l.starts_end));
        list.words.truncate(ends.0);
        list.starts.truncate(ends.1);
    }

    /// Asks the device for more than the usual shared memory, once; a refusal shows when the kernel is launched.
    fn allow_shared(&mut self, kernel: Kernel, bytes: u32) {
        let allowed = self.shared_allowed.entry(kernel).or_default();
        if *allowed < bytes {
            *allowed = bytes;
            let asked = self.device.allow_shared(kernel, bytes);
            self.failed = self.failed.take().or(asked.err());
        }
    }

    /// Sends everything that waits to the device.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        if let Some(e) = self.failed.take() {
            self.waiting.clear();
            return Err(e);
        }
        let mut list = std::mem::take(&mut self.waiting);
        let result = self.run(&mut list);
        list.clear();
        // Its memory serves the next list.
        self.waiting = list;
        result
    }

    fn run(&mut self, list: &mut List) -> Result<(), Error> {
        if list.launches.len() < GRAPH_LAUNCHES_MIN {
            return self.launch_each(list);
        }
        match self.seen.get(&*list) {
            Some(Some(graph)) => self.device.driver.launch_graph(graph, &self.stream),
            Some(None) if self.graphs < GRAPHS_MAX => {
                let graph = self.device.driver.capture(&self.stream, || self.launch_each(list))?;
                self.device.driver.launch_graph(&graph, &self.stream)?;
                self.graphs += 1;
                self.seen.insert(list.clone(), Some(graph));
                Ok(())
            }
            Some(None) => self.launch_each(list),
            None => {
                if self.seen.len() < SEEN_MAX {
                    self.seen.insert(list.clone(), None);
                }
                self.launch_each(list)
            }
        }
    }

    #[allow(unsafe_code, reason = "kernels of the fatbin")]
    fn launch_each(&self, list: &List) -> Result<(), Error> {
        let (mut pointers, mut first) = (Vec::new(), 0);
        for l in &list.launches {
            pointers.clear();
            let starts = &list.starts[first..l.starts_end];
            pointers.extend(starts.iter().map(|&at| list.words[at..].as_ptr().cast_mut().cast::<c_void>()));
            first = l.starts_end;
            let function = self.device.function(l.kernel);
            // SAFETY: each op of this crate passes what its kernel declares, and checked the sizes of its buffers; the
            // driver copies the arguments before it returns.
            unsafe {
                self.device.driver.launch(
                    function,
                    &l.shape,
                    self.device.overlaps(),
                    &mut pointers,
                    &self.stream,
                )?;
            }
        }
        Ok(())
    }

    /// Copies to the device, after what is in line, but before what waits.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn upload(&mut self, to: DevicePtr, bytes: &[u8]) -> Result<(), Error> {
        // SAFETY: callers took room for them.
        unsafe { self.device.driver.upload(to, bytes, &self.stream) }
    }

    /// Zeroes memory, after what is in line, but before what waits.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn zero(&mut self, at: DevicePtr, bytes: usize) -> Result<(), Error> {
        // SAFETY: callers took room for them.
        unsafe { self.device.driver.zero(at, bytes, &self.stream) }
    }

    /// Copies on the device, after everything before.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn copy(&mut self, to: DevicePtr, from: DevicePtr, bytes: usize) -> Result<(), Error> {
        self.flush()?;
        // SAFETY: callers checked both against what they took.
        unsafe { self.device.driver.copy(to, from, bytes, &self.stream) }
    }

    /// Asks for bytes, once everything before has run.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn download(&mut self, from: DevicePtr, bytes: usize) -> Result<(), Error> {
        self.flush()?;
        let mut pinned = match self.pinned.take() {
            Some(p) if p.bytes() >= bytes => p,
            other => {
                if let Some(old) = other {
                    self.wait()?;
                    self.device.driver.drop_pinned(old);
                }
                self.device.driver.pinned(bytes.next_power_of_two())?
            }
        };
        // SAFETY: callers checked `from`; `wait` comes before anyone reads.
        let asked = unsafe { self.device.driver.download(&mut pinned, from, bytes, &self.stream) };
        self.pinned = Some(pinned);
        asked
    }

    /// Waits for the device.
    pub(crate) fn wait(&mut self) -> Result<(), Error> {
        self.flush()?;
        let start = Instant::now();
        let done = self.device.driver.synchronize(&self.stream);
        self.waited.fetch_add(start.elapsed().as_nanos() as u64, Relaxed);
        done
    }

    /// Nanoseconds in which the device was waited for.
    pub(crate) fn waited(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.waited)
    }

    /// What the last download brought, after [`Queue::wait`].
    pub(crate) fn downloaded(&self) -> Option<&Pinned> {
        self.pinned.as_ref()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.device.enter().is_err() {
            return;
        }
        let driver = self.device.driver;
        // What still runs uses memory that goes next; a failure means that nothing runs.
        let _ = driver.synchronize(&self.stream);
        for graph in self.seen.drain().filter_map(|(_, graph)| graph) {
            driver.drop_graph(graph);
        }
        if let Some(pinned) = self.pinned.take() {
            driver.drop_pinned(pinned);
        }
        driver.drop_stream(&self.stream);
    }
}
