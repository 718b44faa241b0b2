// What torch asks of a device: the current device and stream of each thread, allocators, streams and events.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstdint>

namespace simulated {

c10::Allocator* device_allocator();

int current_device();
void set_current_device(int device);

// The number of a stream in the scheduler, from torch's name of it, and back.
int64_t number_of(const c10::Stream& stream);
c10::Stream stream_of(int64_t number);
int64_t current_stream(int device);

const at::Generator& generator(int device);

// Whether the device was used in this process: a real one would have a context then.
bool has_context(int device);

}  // namespace simulated
