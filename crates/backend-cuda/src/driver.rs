//! The CUDA driver: opened at run time, a few of its functions behind checked calls.
//!
//! Names, types and values are those of NVIDIA's `cuda.h` ("CUDA Driver API", version 13.0).

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    ptr,
    sync::OnceLock,
};

use libloading::Library;
use oxseek_tensor::Error;

use crate::queue::Shape;

/// The oldest driver whose CUDA runs the embedded kernels (they are built by nvcc 13.0).
const VERSION_MIN: c_int = 13_000;
const OUT_OF_MEMORY: c_int = 2;
/// `CU_DEVICE_ATTRIBUTE_*`
const MULTIPROCESSORS: c_int = 16;
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`
const SHARED_BYTES_MAX: c_int = 8;
/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`
const CAPTURE_OF_THREAD: c_int = 1;

/// A pointer of the device.
pub(crate) type DevicePtr = u64;
/// An opaque handle of the driver.
type Handle = *mut c_void;

/// `CUlaunchConfig`
#[repr(C)]
struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    stream: Handle,
    attributes: *const LaunchAttribute,
    count: c_uint,
}

/// `CUlaunchAttribute`
#[repr(C)]
struct LaunchAttribute {
    id: c_uint,
    padding: c_uint,
    value: [u64; 8],
}

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: the kernel may begin before those in front of it end.
const OVERLAP: LaunchAttribute = LaunchAttribute { id: 6, padding: 0, value: [1, 0, 0, 0, 0, 0, 0, 0] };

/// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`
const CLUSTER: c_uint = 4;

/// A loaded kernel.
#[derive(Clone, Copy)]
pub(crate) struct Function(Handle);

macro_rules! functions {
    ($($name:ident = $symbol:literal($($arg:ty),*);)*) => {
        struct Functions {
            $($name: unsafe extern "C" fn($($arg),*) -> c_int,)*
            /// Keeps the code of the others in memory.
            _library: Library,
        }

        impl Functions {
            #[allow(unsafe_code, reason = "symbols of a C library")]
            fn open() -> Result<Self, Error> {
                let library = open_library()?;
                $(
                    // SAFETY: the type is that of `cuda.h`, and the library is kept as long as the pointer.
                    let $name = unsafe { library.get(concat!($symbol, "\0").as_bytes()) }
                        .map(|symbol| *symbol)
                        .map_err(|_| Error::Device(format!("the NVIDIA driver is too old: it has no {}", $symbol)))?;
                )*
                Ok(Self { $($name,)* _library: library })
            }
        }
    };
}

functions! {
    init = "cuInit"(c_uint);
    version = "cuDriverGetVersion"(*mut c_int);
    error_name = "cuGetErrorName"(c_int, *mut *const c_char);
    count = "cuDeviceGetCount"(*mut c_int);
    device = "cuDeviceGet"(*mut c_int, c_int);
    device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
    attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
    set_current = "cuCtxSetCurrent"(Handle);
    memory_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
    alloc = "cuMemAlloc_v2"(*mut DevicePtr, usize);
    free = "cuMemFree_v2"(DevicePtr);
    host_alloc = "cuMemHostAlloc"(*mut Handle, usize, c_uint);
    host_free = "cuMemFreeHost"(Handle);
    upload = "cuMemcpyHtoDAsync_v2"(DevicePtr, *const c_void, usize, Handle);
    download = "cuMemcpyDtoHAsync_v2"(*mut c_void, DevicePtr, usize, Handle);
    copy = "cuMemcpyDtoDAsync_v2"(DevicePtr, DevicePtr, usize, Handle);
    fill = "cuMemsetD8Async"(DevicePtr, u8, usize, Handle);
    stream = "cuStreamCreate"(*mut Handle, c_uint);
    stream_destroy = "cuStreamDestroy_v2"(Handle);
    synchronize = "cuStreamSynchronize"(Handle);
    begin_capture = "cuStreamBeginCapture_v2"(Handle, c_int);
    end_capture = "cuStreamEndCapture"(Handle, *mut Handle);
    instantiate = "cuGraphInstantiateWithFlags"(*mut Handle, Handle, u64);
    graph_destroy = "cuGraphDestroy"(Handle);
    graph_launch = "cuGraphLaunch"(Handle, Handle);
    exec_destroy = "cuGraphExecDestroy"(Handle);
    module = "cuModuleLoadData"(*mut Handle, *const c_void);
    function = "cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
    function_attribute = "cuFuncSetAttribute"(Handle, c_int, c_int);
    launch = "cuLaunchKernelEx"(*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void);
}

#[allow(unsafe_code, reason = "opening a library runs its initialisers")]
fn open_library() -> Result<Library, Error> {
    let names: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1", "libcuda.so"] };
    for name in names {
        // SAFETY: the driver's initialisers have no preconditions.
        if let Ok(library) = unsafe { Library::new(name) } {
            return Ok(library);
        }
    }
    Err(Error::Device(format!("no NVIDIA driver: {} cannot be opened", names[0])))
}

/// The driver, after `cuInit`.
pub(crate) struct Driver {
    f: Functions,
}

/// Where kernels and copies wait in line.
pub(crate) struct Stream(Handle);

/// Kernels of one stream as one thing to launch.
pub(crate) struct Graph(Handle);

/// Page-locked memory of the host.
pub(crate) struct Pinned {
    at: *mut u8,
    bytes: usize,
}

// SAFETY: a handle is a number to the driver, whose functions take calls from any thread.
#[allow(unsafe_code, reason = "handles move with their backend")]
unsafe impl Send for Stream {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "handles move with their backend")]
unsafe impl Send for Graph {}
// SAFETY: it owns its memory.
#[allow(unsafe_code, reason = "the buffer moves with its backend")]
unsafe impl Send for Pinned {}
// SAFETY: as `Stream`; nothing is changed through it.
#[allow(unsafe_code, reason = "kernels are shared by all backends of a device")]
unsafe impl Send for Function {}
// SAFETY: as `Stream`; nothing is changed through it.
#[allow(unsafe_code, reason = "kernels are shared by all backends of a device")]
unsafe impl Sync for Function {}

/// The context of a device, which lives as long as the process.
#[derive(Clone, Copy)]
pub(crate) struct Context(Handle);

// SAFETY: as `Stream`.
#[allow(unsafe_code, reason = "a context is entered from any thread")]
unsafe impl Send for Context {}
// SAFETY: as `Stream`.
#[allow(unsafe_code, reason = "a context is entered from any thread")]
unsafe impl Sync for Context {}

/// What a device is.
pub(crate) struct DeviceFacts {
    pub(crate) name: String,
    /// Major and minor.
    pub(crate) capability: (i32, i32),
    pub(crate) multiprocessors: usize,
}

impl Driver {
    /// The driver of this process; opened once.
    ///
    /// # Errors
    /// [`Error::Device`]: no driver, one that is too old, or no device.
    pub(crate) fn get() -> Result<&'static Self, Error> {
        static DRIVER: OnceLock<Result<Driver, Error>> = OnceLock::new();
        DRIVER.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    #[allow(unsafe_code, reason = "calls of the driver")]
    fn open() -> Result<Self, Error> {
        let driver = Self { f: Functions::open()? };
        let mut version = 0;
        // SAFETY: it writes one number.
        driver.check("cuDriverGetVersion", unsafe { (driver.f.version)(&raw mut version) })?;
        if version < VERSION_MIN {
            let (found, wanted) = (dotted(version), dotted(VERSION_MIN));
            let why =
                format!("the NVIDIA driver is too old: it has CUDA {found}, {wanted} is needed (driver 580)");
            return Err(Error::Device(why));
        }
        // SAFETY: no preconditions.
        driver.check("cuInit", unsafe { (driver.f.init)(0) })?;
        Ok(driver)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), Error> {
        if code == 0 { Ok(()) } else { Err(self.error(call, code)) }
    }

    #[allow(unsafe_code, reason = "calls of the driver")]
    fn error(&self, call: &'static str, code: c_int) -> Error {
        let mut name: *const c_char = ptr::null();
        // SAFETY: it writes a pointer to a text that is never freed, or null.
        let known = unsafe { (self.f.error_name)(code, &raw mut name) } == 0 && !name.is_null();
        // SAFETY: checked above.
        let name = if known { unsafe { CStr::from_ptr(name) }.to_string_lossy() } else { "unknown".into() };
        Error::Device(format!("{call}: {name} ({code})"))
    }

    /// Number of devices.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn device_count(&self) -> Result<usize, Error> {
        let mut count = 0;
        // SAFETY: it writes one number.
        self.check("cuDeviceGetCount", unsafe { (self.f.count)(&raw mut count) })?;
        Ok(count.max(0) as usize)
    }

    /// The context of device `ordinal`, below the number of devices.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn context(&self, ordinal: usize) -> Result<(Context, DeviceFacts), Error> {
        let (mut device, mut context, mut name) = (0, ptr::null_mut(), [0u8; 128]);
        // SAFETY: it writes one number.
        self.check("cuDeviceGet", unsafe { (self.f.device)(&raw mut device, ordinal as c_int) })?;
        // SAFETY: it writes at most as many bytes as it is told, the last of them zero.
        let code = unsafe { (self.f.device_name)(name.as_mut_ptr().cast(), name.len() as c_int, device) };
        self.check("cuDeviceGetName", code)?;
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: it writes one number.
            self.check("cuDeviceGetAttribute", unsafe { (self.f.attribute)(&raw mut value, which, device) })?;
            Ok::<_, Error>(value)
        };
        let facts = DeviceFacts {
            name: CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned(),
            capability: (attribute(CAPABILITY_MAJOR)?, attribute(CAPABILITY_MINOR)?),
            multiprocessors: attribute(MULTIPROCESSORS)?.max(1) as usize,
        };
        // SAFETY: it writes one handle.
        self.check("cuDevicePrimaryCtxRetain", unsafe { (self.f.retain)(&raw mut context, device) })?;
        Ok((Context(context), facts))
    }

    /// Makes the calls of this thread go to `context`.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn enter(&self, context: Context) -> Result<(), Error> {
        // SAFETY: a context of this process, which is never released.
        self.check("cuCtxSetCurrent", unsafe { (self.f.set_current)(context.0) })
    }

    /// Free and total bytes of the device.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn memory(&self) -> Result<(usize, usize), Error> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: it writes two numbers.
        self.check("cuMemGetInfo", unsafe { (self.f.memory_info)(&raw mut free, &raw mut total) })?;
        Ok((free, total))
    }

    /// Memory of the device.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] or [`Error::Device`].
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn alloc(&self, what: &'static str, bytes: usize) -> Result<DevicePtr, Error> {
        let mut at = 0;
        // SAFETY: it writes one pointer.
        match unsafe { (self.f.alloc)(&raw mut at, bytes) } {
            OUT_OF_MEMORY => Err(Error::OutOfMemory { what, bytes }),
            code => self.check("cuMemAlloc", code).map(|()| at),
        }
    }

    /// Gives memory of the device back.
    ///
    /// # Safety
    /// `at` came from [`Driver::alloc`], and nobody uses it any more.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) unsafe fn free(&self, at: DevicePtr) {
        // SAFETY: the caller's promise. A failure means that the device is lost, and its memory with it.
        unsafe { (self.f.free)(at) };
    }

    /// Page-locked memory, zeroed.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn pinned(&self, bytes: usize) -> Result<Pinned, Error> {
        let mut at = ptr::null_mut();
        // SAFETY: it writes one pointer.
        self.check("cuMemHostAlloc", unsafe { (self.f.host_alloc)(&raw mut at, bytes, 0) })?;
        // SAFETY: the memory is that long.
        unsafe { ptr::write_bytes(at.cast::<u8>(), 0, bytes) };
        Ok(Pinned { at: at.cast(), bytes })
    }

    /// A stream of the current context.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn stream(&self) -> Result<Stream, Error> {
        let mut stream = ptr::null_mut();
        // SAFETY: it writes one handle.
        self.check("cuStreamCreate", unsafe { (self.f.stream)(&raw mut stream, 0) })?;
        Ok(Stream(stream))
    }

    /// Waits for everything in the stream.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn synchronize(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: a live stream.
        self.check("cuStreamSynchronize", unsafe { (self.f.synchronize)(stream.0) })
    }

    /// Copies `bytes` to the device, in the stream's order; `bytes` may change as soon as this returns, because they
    /// are not page-locked.
    ///
    /// # Safety
    /// `to` has room for them.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) unsafe fn upload(&self, to: DevicePtr, bytes: &[u8], stream: &Stream) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.f.upload)(to, bytes.as_ptr().cast(), bytes.len(), stream.0) };
        self.check("cuMemcpyHtoD", code)
    }

    /// Begins to copy `bytes` bytes from the device.
    ///
    /// # Safety
    /// `from` has that many, and `to` is read after the stream was waited for only.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) unsafe fn download(
        &self,
        to: &mut Pinned,
        from: DevicePtr,
        bytes: usize,
        stream: &Stream,
    ) -> Result<(), Error> {
        let bytes = bytes.min(to.bytes);
        // SAFETY: the caller's promise, and the line above.
        self.check("cuMemcpyDtoH", unsafe { (self.f.download)(to.at.cast(), from, bytes, stream.0) })
    }

    /// Copies on the device.
    ///
    /// # Safety
    /// Both have `bytes` bytes.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) unsafe fn copy(
        &self,
        to: DevicePtr,
        from: DevicePtr,
        bytes: usize,
        stream: &Stream,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        self.check("cuMemcpyDtoD", unsafe { (self.f.copy)(to, from, bytes, stream.0) })
    }

    /// Zeroes memory.
    ///
    /// # Safety
    /// `at` has `bytes` bytes.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) unsafe fn zero(&self, at: DevicePtr, bytes: usize, stream: &Stream) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        self.check("cuMemsetD8", unsafe { (self.f.fill)(at, 0, bytes, stream.0) })
    }

    /// The kernels `names` of a fatbin; the module stays loaded.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn kernels(&self, fatbin: &[u8], names: &[&'static str]) -> Result<Vec<Function>, Error> {
        let mut module = ptr::null_mut();
        // SAFETY: a whole fatbin, which says its own length.
        self.check("cuModuleLoadData", unsafe { (self.f.module)(&raw mut module, fatbin.as_ptr().cast()) })?;
        let one = |name: &&'static str| {
            let mut function = ptr::null_mut();
            let symbol = CString::new(*name).map_err(|e| Error::Device(e.to_string()))?;
            // SAFETY: a live module and a text that ends in zero.
            let code = unsafe { (self.f.function)(&raw mut function, module, symbol.as_ptr()) };
            self.check("cuModuleGetFunction", code)?;
            Ok(Function(function))
        };
        names.iter().map(one).collect()
    }

    /// Lets a kernel use so many bytes of shared memory.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn allow_shared(&self, function: Function, bytes: usize) -> Result<(), Error> {
        // SAFETY: a live function.
        let code = unsafe { (self.f.function_attribute)(function.0, SHARED_BYTES_MAX, bytes as c_int) };
        self.check("cuFuncSetAttribute", code)
    }

    /// Puts a kernel in line. With `overlap` it may begin before those in front of it end.
    ///
    /// # Safety
    /// `arguments` point to values of the types that the kernel declares, and its pointers to memory that is as large
    /// as it expects. A kernel that overlaps waits by itself before it touches memory that others write.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) unsafe fn launch(
        &self,
        function: Function,
        shape: &Shape,
        overlap: bool,
        arguments: &mut [*mut c_void],
        stream: &Stream,
    ) -> Result<(), Error> {
        let &Shape { grid, block, shared, cluster } = shape;
        // Three numbers of four bytes: blocks in each direction.
        let value = [u64::from(cluster) | 1 << 32, 1, 0, 0, 0, 0, 0, 0];
        let of_cluster = LaunchAttribute { id: CLUSTER, padding: 0, value };
        let wanted = [overlap.then_some(OVERLAP), (cluster > 1).then_some(of_cluster)];
        let attributes: Vec<_> = wanted.into_iter().flatten().collect();
        let config = LaunchConfig {
            grid,
            block: [block, 1, 1],
            shared,
            stream: stream.0,
            attributes: attributes.as_ptr(),
            count: attributes.len() as u32,
        };
        let (arguments, none) = (arguments.as_mut_ptr(), ptr::null_mut());
        // SAFETY: the caller's promise.
        let code = unsafe { (self.f.launch)(&raw const config, function.0, arguments, none) };
        self.check("cuLaunchKernelEx", code)
    }

    /// What `put` puts in line becomes a graph instead.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn capture(
        &self,
        stream: &Stream,
        put: impl FnOnce() -> Result<(), Error>,
    ) -> Result<Graph, Error> {
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: a live stream.
        self.check("cuStreamBeginCapture", unsafe { (self.f.begin_capture)(stream.0, CAPTURE_OF_THREAD) })?;
        let put = put();
        // SAFETY: it writes one handle.
        let ended =
            self.check("cuStreamEndCapture", unsafe { (self.f.end_capture)(stream.0, &raw mut graph) });
        put.and(ended)?;
        // SAFETY: a live graph; it writes one handle.
        let made = self.check("cuGraphInstantiate", unsafe { (self.f.instantiate)(&raw mut exec, graph, 0) });
        // SAFETY: the graph is not used any more; what was made of it is its own.
        unsafe { (self.f.graph_destroy)(graph) };
        made.map(|()| Graph(exec))
    }

    /// Puts a graph in line.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn launch_graph(&self, graph: &Graph, stream: &Stream) -> Result<(), Error> {
        // SAFETY: live handles; the kernels' arguments were promised to `launch`.
        self.check("cuGraphLaunch", unsafe { (self.f.graph_launch)(graph.0, stream.0) })
    }

    /// Forgets a graph.
    #[allow(unsafe_code, reason = "calls of the driver")]
    #[allow(clippy::needless_pass_by_value, reason = "what is forgotten cannot be used again")]
    pub(crate) fn drop_graph(&self, graph: Graph) {
        // SAFETY: it was alive, and is gone with this.
        unsafe { (self.f.exec_destroy)(graph.0) };
    }

    /// Forgets a stream that was waited for.
    #[allow(unsafe_code, reason = "calls of the driver")]
    pub(crate) fn drop_stream(&self, stream: &Stream) {
        // SAFETY: called once, by the drop of its owner.
        unsafe { (self.f.stream_destroy)(stream.0) };
    }

    /// Gives page-locked memory back.
    #[allow(unsafe_code, reason = "calls of the driver")]
    #[allow(clippy::needless_pass_by_value, reason = "what is forgotten cannot be used again")]
    pub(crate) fn drop_pinned(&self, pinned: Pinned) {
        // SAFETY: it came from `pinned`, and is gone with this.
        unsafe { (self.f.host_free)(pinned.at.cast()) };
    }
}

impl Pinned {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first values; the stream that fills them was waited for.
    #[allow(unsafe_code, reason = "memory of the driver as a slice")]
    pub(crate) fn values(&self, n: usize) -> &[f32] {
        // SAFETY: page-locked memory begins at a page, and any bits are an F32.
        unsafe { std::slice::from_raw_parts(self.at.cast(), n.min(self.bytes / 4)) }
    }

    /// The first bytes; the stream that fills them was waited for.
    #[allow(unsafe_code, reason = "memory of the driver as a slice")]
    pub(crate) fn words(&self, n: usize) -> &[u32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.at.cast(), n.min(self.bytes / 4)) }
    }
}

/// `13000` as people write it.
fn dotted(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(dotted(13_000), "13.0");
        assert_eq!(dotted(12_080), "12.8");
    }

    /// With a driver or without one: an answer in words, never a crash.
    #[test]
    fn a_machine_without_a_driver_is_told_so() {
        if let Err(e) = Driver::get() {
            let text = e.to_string();
            assert!(text.contains("NVIDIA driver") || text.contains("cuInit"), "{text}");
        }
    }
}
