// Memory of the devices, and host memory that devices reach without the host's help.
//
// NOTE [ Two addresses of one byte ]
// Each device has one region of memory, mapped twice. Tensors hold addresses of the first mapping, which nobody may read
// or write: a host that touches device memory dies at once, as it would with a real device. Operations of the device use
// the second mapping. `on_device` leads from one to the other.
//
// NOTE [ Freed memory ]
// As in torch's own allocator of device memory, a freed block can be taken again at once by an allocation on the stream
// that it was allocated on, because that stream's order makes it safe; other streams that use the block have to be named
// with record_stream(). Here a freed block is the first to be taken again, and is overwritten (in its stream's order) with
// a pattern, so that whoever forgets record_stream() reads the pattern.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "scheduler.h"

namespace simulated {

struct Use {
  int64_t allocated = 0;  // bytes
  int64_t peak = 0;
  int64_t allocations = 0;
};

class DeviceMemory {
 public:
  static DeviceMemory& get();

  // Returns an address that the host must not touch; 0 if the device has not as many bytes.
  void* allocate(int device, size_t nbytes, int64_t stream);
  void free(void* address);
  // The block is not taken again before what is in the stream when it is freed has run.
  void record_stream(void* address, int64_t stream);

  bool contains(const void* address) const;
  int device_of(const void* address) const;
  void* on_device(const void* address) const;

  Use& use(int device) { return uses_[device]; }
  void set_limit(size_t nbytes) { limit_ = nbytes; }

 private:
  struct Block {
    int device;
    size_t nbytes;
    int64_t stream;
    std::vector<int64_t> others;  // streams of record_stream()
  };
  struct Free {
    char* address;
    size_t nbytes;
    int64_t stream;
    std::vector<Point> until;
  };

  DeviceMemory();
  char* take(int device, size_t nbytes, int64_t stream);

  char* base_ = nullptr;   // nobody may touch it
  char* alias_ = nullptr;  // the same bytes
  size_t next_[kDevices] = {};
  std::map<char*, Block> blocks_;
  std::vector<Free> free_[kDevices];
  Use uses_[kDevices];
  size_t limit_;
};

class PinnedMemory {
 public:
  static PinnedMemory& get();

  void* allocate(size_t nbytes);
  void free(void* address);
  // Memory of somebody else that devices may reach from now on.
  void register_range(void* address, size_t nbytes);
  void unregister_range(void* address);
  bool contains(const void* address) const;
  // The block that `address` lies in is not taken again before `point`.
  void in_use_until(const void* address, Point point);
  size_t num_registered() const;

 private:
  struct Block {
    size_t nbytes;
    bool is_ours;
    std::vector<Point> until;
  };
  Block* find(const void* address);

  std::map<char*, Block> blocks_;
  std::vector<std::pair<char*, Block>> waiting_;  // freed, and still used by operations
};

}  // namespace simulated
