#include "runtime.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Storage.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstring>

#include "memory.h"
#include "scheduler.h"

namespace simulated {

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;

thread_local int device_of_thread = 0;
thread_local int64_t streams_of_thread[kDevices] = {0, 1};
std::atomic<bool> used[kDevices];

void use(int device) {
  used[device] = true;
}

c10::Device device(int index) {
  return {kType, static_cast<c10::DeviceIndex>(index)};
}

int checked(int index) {
  TORCH_CHECK(index >= 0 && index < kDevices, "there is no simulated device ", index, "; there are ", kDevices);
  return index;
}

void free_on_device(void* address) {
  DeviceMemory::get().free(address);
}

void free_pinned(void* address) {
  PinnedMemory::get().free(address);
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    const int index = device_of_thread;
    use(index);
    void* address = DeviceMemory::get().allocate(index, nbytes, current_stream(index));
    TORCH_CHECK_WITH(
        OutOfMemoryError, address != nullptr || nbytes == 0, "the simulated device ", index, " has not ", nbytes,
        " bytes left");
    return {address, address, &free_on_device, device(index)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &free_on_device;
  }
  void copy_data(void* to, const void* from, size_t nbytes) const override {
    auto& memory = DeviceMemory::get();
    auto& scheduler = Scheduler::get();
    void* target = memory.on_device(to);
    const void* source = memory.on_device(from);
    scheduler.enqueue(current_stream(memory.device_of(to)), [=] { std::memcpy(target, source, nbytes); });
  }
};

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    use(device_of_thread);
    void* address = nbytes == 0 ? nullptr : PinnedMemory::get().allocate(nbytes);
    return {address, address, &free_pinned, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &free_pinned;
  }
  void copy_data(void* to, const void* from, size_t nbytes) const override {
    std::memcpy(to, from, nbytes);
  }
};

DeviceAllocator the_device_allocator;
PinnedAllocator the_pinned_allocator;
REGISTER_ALLOCATOR(kType, &the_device_allocator);

// An event is the point in a stream where it was recorded last.
Point& point_of(void* event) {
  return *static_cast<Point*>(event);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kType;
  }
  c10::Device exchangeDevice(c10::Device to) const override {
    const c10::Device before = getDevice();
    setDevice(to);
    return before;
  }
  c10::Device getDevice() const override {
    return device(device_of_thread);
  }
  void setDevice(c10::Device to) const override {
    if (to.has_index())
      set_current_device(to.index());
  }
  void uncheckedSetDevice(c10::Device to) const noexcept override {
    if (to.index() >= 0 && to.index() < kDevices)
      device_of_thread = to.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return kDevices;
  }

  c10::Stream getStream(c10::Device of) const override {
    return stream_of(current_stream(of.has_index() ? checked(of.index()) : device_of_thread));
  }
  c10::Stream getDefaultStream(c10::Device of) const override {
    return stream_of(Scheduler::default_stream(of.has_index() ? checked(of.index()) : device_of_thread));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device of, bool) const override {
    return getNewStream(of, 0);
  }
  c10::Stream getNewStream(c10::Device of, int) const override {
    const int index = of.has_index() ? checked(of.index()) : device_of_thread;
    use(index);
    return stream_of(Scheduler::get().new_stream(index));
  }
  c10::Stream exchangeStream(c10::Stream to) const override {
    const int index = checked(to.device_index());
    const c10::Stream before = stream_of(streams_of_thread[index]);
    streams_of_thread[index] = number_of(to);
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override {
    auto& scheduler = Scheduler::get();
    return scheduler.query(scheduler.here(number_of(stream)));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    auto& scheduler = Scheduler::get();
    ++scheduler.counters().synchronizations;
    scheduler.finish_stream(number_of(stream));
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    auto& scheduler = Scheduler::get();
    ++scheduler.counters().synchronizations;
    scheduler.finish_device(checked(index));
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr)
      *event = new Point();
    point_of(*event) = Scheduler::get().here(number_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr)
      Scheduler::get().wait(number_of(stream), point_of(event));
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || Scheduler::get().query(point_of(event));
  }
  void synchronizeEvent(void* event) const override {
    ++Scheduler::get().counters().synchronizations;
    if (event != nullptr)
      Scheduler::get().finish(point_of(event));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Point*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    DeviceMemory::get().record_stream(data.get(), number_of(stream));
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Some of these are not in every version of the interface, so none says `override`.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsuggest-override"
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const {
    return true;
  }
  bool isAvailable() const {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex index) const {
    return has_context(checked(index));
  }
  c10::DeviceIndex deviceCount() const {
    return kDevices;
  }
  void setCurrentDevice(c10::DeviceIndex index) const {
    set_current_device(index);
  }
  c10::DeviceIndex getCurrentDevice() const {
    return static_cast<c10::DeviceIndex>(device_of_thread);
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const {
    const auto before = getCurrentDevice();
    set_current_device(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const {
    return exchangeDevice(index);
  }
  bool isPinnedPtr(const void* address) const {
    return PinnedMemory::get().contains(address);
  }
  c10::Allocator* getPinnedMemoryAllocator() const {
    return &the_pinned_allocator;
  }
  c10::Device getDeviceFromPtr(void* address) const {
    TORCH_CHECK(DeviceMemory::get().contains(address), "this is no memory of a simulated device");
    return device(DeviceMemory::get().device_of(address));
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const {
    return generator(index < 0 ? device_of_thread : checked(index));
  }
  at::Generator getNewGenerator(c10::DeviceIndex = -1) const {
    return at::make_generator<at::CPUGeneratorImpl>();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const {
    auto* impl = storage.unsafeGetStorageImpl();
    auto& memory = DeviceMemory::get();
    const int before = device_of_thread;
    device_of_thread = impl->device().index();
    c10::DataPtr larger = the_device_allocator.allocate(nbytes);
    device_of_thread = before;
    const size_t kept = std::min(nbytes, impl->nbytes());
    if (kept > 0)
      the_device_allocator.copy_data(larger.get(), impl->data(), kept);
    (void)memory;
    impl->set_data_ptr(std::move(larger));
    impl->set_nbytes(nbytes);
  }
};
#pragma GCC diagnostic pop

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

}  // namespace

c10::Allocator* device_allocator() {
  return &the_device_allocator;
}

int current_device() {
  return device_of_thread;
}

void set_current_device(int index) {
  device_of_thread = checked(index);
}

int64_t number_of(const c10::Stream& stream) {
  // torch's name of every device's default stream is 0.
  return stream.id() == 0 ? Scheduler::default_stream(checked(stream.device_index())) : stream.id();
}

c10::Stream stream_of(int64_t number) {
  const int index = Scheduler::get().device_of(number);
  return c10::Stream(c10::Stream::UNSAFE, device(index), number < kDevices ? 0 : number);
}

int64_t current_stream(int index) {
  return streams_of_thread[checked(index)];
}

const at::Generator& generator(int index) {
  static auto* generators = new std::vector<at::Generator>{
      at::make_generator<at::CPUGeneratorImpl>(), at::make_generator<at::CPUGeneratorImpl>()};
  return generators->at(index);
}

bool has_context(int index) {
  return used[index];
}

}  // namespace simulated
