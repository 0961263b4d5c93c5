//! Which backend a model runs on.

use oxseek_backend_cuda::{CudaBackend, CudaOptions, Precision};
use oxseek_model::{Footprint, LoadOptions};
use oxseek_tensor::Backend;
use oxseek_weights::Checkpoint;

use crate::{
    args::{DeviceArg, ModelArgs, PrecisionArg},
    failure::Failure,
    inspect::size,
    open::placed_backend,
};

/// Memory that the driver and kernels take beside weights, cache and activations.
const CUDA_RESERVE_BYTES: u64 = 768 << 20;
/// What the error of a machine without an NVIDIA driver begins with: nothing to tell there.
const NO_DRIVER: &str = "device: no NVIDIA driver";

/// The backend that the command line asks for; says on standard error when a GPU is there and not taken.
///
/// # Errors
/// [`Failure::Usage`] when the device that was named cannot be used.
pub fn chosen_backend(
    args: &ModelArgs,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
) -> Result<Box<dyn Backend>, Failure> {
    match args.device {
        DeviceArg::Cpu => {}
        DeviceArg::Cuda(ordinal) => {
            let backend = cuda_backend(args, ordinal, checkpoint, options);
            return backend.map_err(|e| Failure::Usage(format!("--device cuda:{ordinal}: {e}")));
        }
        DeviceArg::Auto => match cuda_backend(args, 0, checkpoint, options) {
            Ok(backend) => return Ok(backend),
            Err(why) if why.starts_with(NO_DRIVER) => {}
            Err(why) => eprintln!("oxseek: running on the CPU: {why}"),
        },
    }
    Ok(Box::new(placed_backend(args, checkpoint, options)?))
}

/// What the command line asks of a GPU.
pub fn cuda_options(args: &ModelArgs, ordinal: u16) -> CudaOptions {
    let precision = match args.precision {
        PrecisionArg::Exact => Precision::Exact,
        PrecisionArg::Native => Precision::Native,
    };
    CudaOptions { ordinal: usize::from(ordinal), precision, ..CudaOptions::default() }
}

/// The GPU, if it holds the model.
fn cuda_backend(
    args: &ModelArgs,
    ordinal: u16,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
) -> Result<Box<dyn Backend>, String> {
    let backend = CudaBackend::new(cuda_options(args, ordinal)).map_err(|e| e.to_string())?;
    let (free, _) = backend.memory().map_err(|e| e.to_string())?;
    let need = cuda_bytes(checkpoint, options);
    if need > free as u64 {
        let (need, free) = (size(need), size(free as u64));
        return Err(format!("the model takes {need}, {free} of the GPU's memory are free"));
    }
    Ok(Box::new(backend))
}

/// Bytes of weights, cache and activations, with what the driver takes.
fn cuda_bytes(checkpoint: &Checkpoint, options: &LoadOptions) -> u64 {
    let footprint = Footprint::of(checkpoint, options.cache_format);
    let weights: u64 = footprint.bytes_by_format.values().sum();
    let tokens = (options.cache_blocks * oxseek_tensor::backend::BLOCK_TOKENS) as u64;
    let cache = footprint.cache_bytes_per_token.saturating_mul(tokens);
    let activations = options.scratch_bytes(checkpoint.config());
    [weights, cache, activations, CUDA_RESERVE_BYTES].into_iter().fold(0, u64::saturating_add)
}
