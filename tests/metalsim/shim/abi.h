// The interface between a compiled kernel and the runtime. Both compilers read this file.
#pragma once

struct msl_lanes {  // the values that the lanes of a SIMD-group passed to an operation
  unsigned active;  // bit i: lane i takes part
  unsigned self;
  unsigned reduced;  // the first lane that needs a reduction stores it in `result`
  unsigned unused;
  alignas(64) unsigned char result[64];
  alignas(64) unsigned char values[32][64];
};

struct msl_thread {
  unsigned position_in_grid[3], position_in_group[3], group_position[3];
  unsigned group_size[3], dispatch_group_size[3], grid_size[3], grid_origin[3], groups[3];
  unsigned index_in_group, lane, simdgroup, simdgroups, dispatch_simdgroups;
};

enum { msl_flag_device = 1, msl_flag_threadgroup = 2 };
enum { msl_atomic_load = 0, msl_atomic_store = 1, msl_atomic_update = 2 };

#ifdef __OPENCL_CPP_VERSION__
#define MSL_PRIVATE __private
#define MSL_API extern "C" __attribute__((convergent, nothrow))
#else
#define MSL_PRIVATE
#define MSL_API extern "C" __attribute__((visibility("default")))
#endif

// Waits for the other lanes and returns the values that they passed. `whole`: all 32 lanes must take part.
MSL_API MSL_PRIVATE msl_lanes* msl_exchange(const MSL_PRIVATE void* value, unsigned size, int whole);
MSL_API void msl_lane_missing(unsigned lane);
MSL_API void msl_barrier(int simdgroup_only, int flags);
MSL_API MSL_PRIVATE void* msl_threadgroup_slot(unsigned slot, unsigned size, unsigned align, unsigned item);
MSL_API void msl_atomic_access(const MSL_PRIVATE void* address, unsigned size, int kind);
MSL_API unsigned long msl_atomic_read(const MSL_PRIVATE void* address, unsigned size);
MSL_API void msl_atomic_write(MSL_PRIVATE void* address, unsigned size, unsigned long bits);
