#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace simulated {

namespace {
constexpr size_t kRegion = size_t(8) << 30;  // of addresses for each device; memory is taken when it is written
constexpr size_t kGranule = 512;
constexpr size_t kGap = 512;  // between blocks, never handed out
constexpr int kFreed = 0xDB;

size_t rounded(size_t nbytes) {
  return std::max(kGranule, (nbytes + kGranule - 1) / kGranule * kGranule);
}

[[noreturn]] void fail(const char* what) {
  throw std::runtime_error(std::string("simulated device memory: ") + what + ": " + std::strerror(errno));
}
}  // namespace

DeviceMemory& DeviceMemory::get() {
  static auto* memory = new DeviceMemory();
  return *memory;
}

DeviceMemory::DeviceMemory() : limit_(kRegion) {
  const size_t total = kRegion * kDevices;
  const int fd = memfd_create("simulated-accelerator", MFD_CLOEXEC);
  if (fd < 0) fail("memfd_create");
  if (ftruncate(fd, static_cast<off_t>(total)) != 0) fail("ftruncate");
  void* base = mmap(nullptr, total, PROT_NONE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  void* alias = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (base == MAP_FAILED || alias == MAP_FAILED) fail("mmap");
  close(fd);
  base_ = static_cast<char*>(base);
  alias_ = static_cast<char*>(alias);
}

char* DeviceMemory::take(int device, size_t nbytes, int64_t stream) {
  auto& free = free_[device];
  // The last one that was freed first: the sooner memory is taken again, the surer a missing wait shows.
  for (auto one = free.rbegin(); one != free.rend(); ++one) {
    const bool fits = one->nbytes == nbytes && one->stream == stream;
    auto& scheduler = Scheduler::get();
    if (fits && std::all_of(one->until.begin(), one->until.end(), [&](Point p) { return scheduler.done(p); })) {
      char* address = one->address;
      free.erase(std::next(one).base());
      return address;
    }
  }
  if (next_[device] + nbytes > kRegion)
    return nullptr;
  char* address = base_ + kRegion * device + next_[device];
  next_[device] += nbytes + kGap;
  return address;
}

void* DeviceMemory::allocate(int device, size_t nbytes, int64_t stream) {
  Lock lock(Scheduler::get().mutex());
  if (nbytes == 0)
    return nullptr;
  Use& use = uses_[device];
  if (static_cast<size_t>(use.allocated) + nbytes > limit_)
    return nullptr;
  char* address = take(device, rounded(nbytes), stream);
  if (address == nullptr)
    return nullptr;
  blocks_[address] = {device, nbytes, stream, {}};
  use.allocated += static_cast<int64_t>(nbytes);
  use.peak = std::max(use.peak, use.allocated);
  ++use.allocations;
  return address;
}

void DeviceMemory::free(void* pointer) {
  if (pointer == nullptr)
    return;
  auto& scheduler = Scheduler::get();
  Lock lock(scheduler.mutex());
  auto* address = static_cast<char*>(pointer);
  auto found = blocks_.find(address);
  if (found == blocks_.end())
    return;
  const Block block = std::move(found->second);
  blocks_.erase(found);
  std::vector<Point> until;
  for (const int64_t stream : block.others)
    until.push_back(scheduler.here(stream));
  uses_[block.device].allocated -= static_cast<int64_t>(block.nbytes);
  free_[block.device].push_back({address, rounded(block.nbytes), block.stream, until});
  if (until.empty()) {
    char* alias = static_cast<char*>(on_device(address));
    const size_t nbytes = block.nbytes;
    scheduler.enqueue(block.stream, [alias, nbytes] { std::memset(alias, kFreed, nbytes); });
  }
}

void DeviceMemory::record_stream(void* address, int64_t stream) {
  Lock lock(Scheduler::get().mutex());
  auto found = blocks_.find(static_cast<char*>(address));
  if (found != blocks_.end() && found->second.stream != stream)
    found->second.others.push_back(stream);
}

bool DeviceMemory::contains(const void* address) const {
  auto* byte = static_cast<const char*>(address);
  return byte >= base_ && byte < base_ + kRegion * kDevices;
}

int DeviceMemory::device_of(const void* address) const {
  return static_cast<int>((static_cast<const char*>(address) - base_) / kRegion);
}

void* DeviceMemory::on_device(const void* address) const {
  return address == nullptr ? nullptr : alias_ + (static_cast<const char*>(address) - base_);
}

PinnedMemory& PinnedMemory::get() {
  static auto* memory = new PinnedMemory();
  return *memory;
}

void* PinnedMemory::allocate(size_t nbytes) {
  auto& scheduler = Scheduler::get();
  Lock lock(scheduler.mutex());
  auto is_unused = [&](const Block& block) {
    return std::all_of(block.until.begin(), block.until.end(), [&](Point p) { return scheduler.done(p); });
  };
  for (auto one = waiting_.begin(); one != waiting_.end(); ++one) {
    if (is_unused(one->second) && one->second.nbytes == rounded(nbytes)) {
      char* address = one->first;
      blocks_[address] = {rounded(nbytes), true, {}};
      waiting_.erase(one);
      return address;
    }
  }
  void* address = std::aligned_alloc(4096, (rounded(nbytes) + 4095) / 4096 * 4096);
  if (address == nullptr)
    throw std::bad_alloc();
  blocks_[static_cast<char*>(address)] = {rounded(nbytes), true, {}};
  return address;
}

void PinnedMemory::free(void* pointer) {
  if (pointer == nullptr)
    return;
  Lock lock(Scheduler::get().mutex());
  auto found = blocks_.find(static_cast<char*>(pointer));
  if (found == blocks_.end())
    return;
  waiting_.emplace_back(found->first, std::move(found->second));
  blocks_.erase(found);
}

void PinnedMemory::register_range(void* address, size_t nbytes) {
  Lock lock(Scheduler::get().mutex());
  auto* first = static_cast<char*>(address);
  for (const auto& [start, block] : blocks_)
    if (start < first + nbytes && first < start + block.nbytes)
      throw std::invalid_argument("a part of this memory is pinned already");
  blocks_[first] = {nbytes, false, {}};
}

void PinnedMemory::unregister_range(void* address) {
  Lock lock(Scheduler::get().mutex());
  auto found = blocks_.find(static_cast<char*>(address));
  if (found == blocks_.end() || found->second.is_ours)
    throw std::invalid_argument("this memory is not registered");
  blocks_.erase(found);
}

PinnedMemory::Block* PinnedMemory::find(const void* address) {
  auto* byte = static_cast<char*>(const_cast<void*>(address));
  auto after = blocks_.upper_bound(byte);
  if (after == blocks_.begin())
    return nullptr;
  auto found = std::prev(after);
  return byte < found->first + found->second.nbytes ? &found->second : nullptr;
}

bool PinnedMemory::contains(const void* address) const {
  Lock lock(Scheduler::get().mutex());
  return const_cast<PinnedMemory*>(this)->find(address) != nullptr;
}

void PinnedMemory::in_use_until(const void* address, Point point) {
  Lock lock(Scheduler::get().mutex());
  if (Block* block = find(address); block != nullptr && block->is_ours)
    block->until.push_back(point);
}

size_t PinnedMemory::num_registered() const {
  Lock lock(Scheduler::get().mutex());
  return static_cast<size_t>(
      std::count_if(blocks_.begin(), blocks_.end(), [](const auto& entry) { return !entry.second.is_ours; }));
}

}  // namespace simulated
