// Everything in one translation unit: one fatbin.
#include "attention.cu"
#include "stream.cu"
