//! The devices of this machine, each opened once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use oxseek_tensor::Error;

use crate::{
    Product,
    driver::{Context, DeviceFacts, DevicePtr, Driver, Function},
    kernels::{FATBIN, Kernel},
};

/// The oldest GPUs that the fatbin has code for.
const CAPABILITY_MIN: (i32, i32) = (8, 0);
const HOPPER: (i32, i32) = (9, 0);
/// A slab of memory is as large as all before it, within these bounds.
const SLAB_BYTES: [usize; 2] = [1 << 20, 1 << 30];
/// Everything begins at a multiple of this.
const ALIGN: usize = 256;

/// An opened device with its kernels.
pub(crate) struct Device {
    pub(crate) driver: &'static Driver,
    context: Context,
    pub(crate) facts: DeviceFacts,
    functions: Vec<Function>,
    /// Bytes of shared memory that kernels were allowed: all queues share the kernels.
    shared_allowed: Mutex<HashMap<Kernel, u32>>,
}

impl Device {
    /// Device `ordinal`, which stays open as long as the process.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason in words.
    pub(crate) fn open(ordinal: usize) -> Result<Arc<Self>, Error> {
        static OPEN: Mutex<Option<HashMap<usize, Arc<Device>>>> = Mutex::new(None);
        let mut open = OPEN.lock().map_err(|_| Error::Device("opening a device failed before".into()))?;
        let open = open.get_or_insert_default();
        if let Some(device) = open.get(&ordinal) {
            return Ok(Arc::clone(device));
        }
        let device = Arc::new(Self::new(ordinal)?);
        open.insert(ordinal, Arc::clone(&device));
        Ok(device)
    }

    fn new(ordinal: usize) -> Result<Self, Error> {
        let driver = Driver::get()?;
        let count = driver.device_count()?;
        if ordinal >= count {
            return Err(Error::Device(format!("no CUDA device {ordinal}: this machine has {count}")));
        }
        let (context, facts) = driver.context(ordinal)?;
        if facts.capability < CAPABILITY_MIN {
            let ((major, minor), name) = (facts.capability, &facts.name);
            let why = format!(
                "{name} has compute capability {major}.{minor}; 8.0 (Ampere) is the oldest supported"
            );
            return Err(Error::Device(why));
        }
        driver.enter(context)?;
        let functions = driver.kernels(FATBIN, Kernel::NAMES)?;
        Ok(Self { driver, context, facts, functions, shared_allowed: Mutex::default() })
    }

    /// Makes the driver calls of this thread go to this device.
    pub(crate) fn enter(&self) -> Result<(), Error> {
        self.driver.enter(self.context)
    }

    /// Whether its kernels wait by themselves for those before them (`begin` of the kernels): only Hopper's code does.
    pub(crate) fn overlaps(&self) -> bool {
        self.facts.capability == HOPPER
    }

    pub(crate) fn multiprocessors(&self) -> usize {
        self.facts.multiprocessors
    }

    /// Blocks of the kernels that stream weights; two of them lie on a multiprocessor.
    pub(crate) fn streams(&self) -> usize {
        2 * self.multiprocessors()
    }

    /// Stages of a warp's ring: `STAGES` of the kernels.
    pub(crate) fn stages(&self) -> usize {
        if self.overlaps() { 3 } else { 2 }
    }

    /// Stages of the ring of a kernel for many tokens: `GEMM_STAGES` of the kernels.
    pub(crate) fn gemm_stages(&self) -> usize {
        if self.overlaps() { 6 } else { 3 }
    }

    /// Tokens of its wide tiles: `WIDE_BF16` and `WIDE_FP8` of the kernels.
    pub(crate) fn wide(&self, product: Product) -> usize {
        match product {
            Product::Bf16 if self.overlaps() => 128,
            Product::Bf16 => 96,
            Product::Fp8 if self.overlaps() => 96,
            Product::Fp8 => 64,
        }
    }

    /// A kernel that wants more than the usual shared memory must say so once.
    pub(crate) fn allow_shared(&self, kernel: Kernel, bytes: u32) -> Result<(), Error> {
        let mut allowed =
            self.shared_allowed.lock().map_err(|_| Error::Device("allowing memory failed before".into()))?;
        let most = allowed.entry(kernel).or_default();
        if *most < bytes {
            self.driver.allow_shared(self.function(kernel), bytes as usize)?;
            *most = bytes;
        }
        Ok(())
    }

    pub(crate) fn function(&self, kernel: Kernel) -> Function {
        self.functions[kernel as usize]
    }
}

/// Memory of a device, taken in slabs and given back all at once.
pub(crate) struct Pool {
    device: Arc<Device>,
    slabs: Vec<DevicePtr>,
    taken: usize,
    /// What is left of the last slab.
    next: DevicePtr,
    left: usize,
}

impl Pool {
    pub(crate) fn new(device: Arc<Device>) -> Self {
        Self { device, slabs: Vec::new(), taken: 0, next: 0, left: 0 }
    }

    /// Bytes taken from the device.
    pub(crate) fn taken(&self) -> usize {
        self.taken
    }

    /// `bytes` of memory, at a multiple of 256; the device was entered.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] or [`Error::Device`].
    pub(crate) fn take(&mut self, what: &'static str, bytes: usize) -> Result<DevicePtr, Error> {
        let bytes = bytes.checked_next_multiple_of(ALIGN).ok_or(Error::Overflow { what })?.max(ALIGN);
        if bytes > self.left {
            let usual = self.taken.clamp(SLAB_BYTES[0], SLAB_BYTES[1]);
            let slab = bytes.max(usual);
            let at = match self.device.driver.alloc(what, slab) {
                // Near the end only what is needed may be there.
                Err(Error::OutOfMemory { .. }) if slab > bytes => return self.take_alone(what, bytes),
                other => other?,
            };
            self.keep(at, slab);
            (self.next, self.left) = (at, slab);
        }
        let at = self.next;
        self.next += bytes as u64;
        self.left -= bytes;
        Ok(at)
    }

    fn take_alone(&mut self, what: &'static str, bytes: usize) -> Result<DevicePtr, Error> {
        let at = self.device.driver.alloc(what, bytes)?;
        self.keep(at, bytes);
        Ok(at)
    }

    fn keep(&mut self, at: DevicePtr, bytes: usize) {
        self.slabs.push(at);
        self.taken += bytes;
    }
}

impl Drop for Pool {
    #[allow(unsafe_code, reason = "calls of the driver")]
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            for at in self.slabs.drain(..) {
                // SAFETY: they came from `alloc`; the backend waited for its stream before it dropped its pool.
                unsafe { self.device.driver.free(at) };
            }
        }
    }
}
