// Everything in one translation unit: one fatbin.
#include "plain.cu"
#include "native.cu"
#include "stream.cu"
