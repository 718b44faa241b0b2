// What Python sees of the simulated accelerator, beside torch's own interfaces.
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>  // not torch/extension.h, which takes three times as long to compile

#include "memory.h"
#include "runtime.h"
#include "scheduler.h"

namespace py = pybind11;
using namespace simulated;

namespace {

py::dict counters() {
  auto& scheduler = Scheduler::get();
  const Lock lock(scheduler.mutex());
  const Counters& now = scheduler.counters();
  py::dict found;
  found["kernels"] = now.kernels;
  found["copies_to_host"] = now.copies_to_host;
  found["bytes_to_host"] = now.bytes_to_host;
  found["copies_to_device"] = now.copies_to_device;
  found["bytes_to_device"] = now.bytes_to_device;
  found["copies_on_device"] = now.copies_on_device;
  found["bytes_on_device"] = now.bytes_on_device;
  found["synchronizations"] = now.synchronizations;
  found["blocking_copies"] = now.blocking_copies;
  found["waits"] = now.waits;
  found["waits_of_default"] = now.waits_of_default;
  return found;
}

void reset_counters() {
  auto& scheduler = Scheduler::get();
  const Lock lock(scheduler.mutex());
  scheduler.counters() = {};
  for (int device = 0; device < kDevices; ++device) {
    Use& use = DeviceMemory::get().use(device);
    use.peak = use.allocated;
    use.allocations = 0;
  }
}

void seed_all(uint64_t seed) {
  for (int device = 0; device < kDevices; ++device) {
    Scheduler::get().finish_device(device);  // what was called before draws from the old seed
    at::Generator one = generator(device);
    one.set_current_seed(seed);
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("device_count", [] { return kDevices; });
  module.def("current_device", &current_device);
  module.def("set_device", &set_current_device);
  module.def("has_context", &has_context);
  module.def("set_mode", [](const std::string& name, uint64_t seed) { Scheduler::get().set_mode(name, seed); });
  module.def("mode", [] { return Scheduler::get().mode(); });
  module.def("counters", &counters);
  module.def("reset_counters", &reset_counters);
  module.def("seed_all", &seed_all);
  module.def("generator", &generator);
  module.def("synchronize", [](int device) {
    ++Scheduler::get().counters().synchronizations;
    Scheduler::get().finish_device(device);
  });
  module.def("memory_allocated", [](int device) { return DeviceMemory::get().use(device).allocated; });
  module.def("max_memory_allocated", [](int device) { return DeviceMemory::get().use(device).peak; });
  module.def("num_allocations", [](int device) { return DeviceMemory::get().use(device).allocations; });
  module.def("set_memory_limit", [](size_t nbytes) { DeviceMemory::get().set_limit(nbytes); });
  module.def("register_host_memory", [](uintptr_t address, size_t nbytes) {
    PinnedMemory::get().register_range(reinterpret_cast<void*>(address), nbytes);
  });
  module.def("unregister_host_memory", [](uintptr_t address) {
    PinnedMemory::get().unregister_range(reinterpret_cast<void*>(address));
  });
  module.def("num_registered", [] { return PinnedMemory::get().num_registered(); });
}
