// All of Metal's standard headers for Clang's C++ for OpenCL.
#pragma once

#include "types.h"
#include "traits.h"
#include "abi.h"
#include "math.h"
#include "integer.h"
#include "simd.h"
#include "matrix.h"
#include "atomic.h"
