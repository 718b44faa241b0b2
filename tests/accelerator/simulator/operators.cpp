// The operators: memory, copies, and a fallback for all others that puts the CPU's operator into the stream.
//
// NOTE [ How an operator gets into a stream ]
// 1. Its outputs are found without computing: by running it on meta tensors, which have shapes and no values.
// 2. They are allocated on the device, and the caller gets them at once.
// 3. What computes goes into the current stream: views of the tensors' memory as CPU tensors, made when it runs, by
//    address. It keeps no memory alive, as a real device does not: memory that is freed too early is overwritten.
// An operator whose output depends on values (item(), nonzero(), equal()) waits for the stream and runs at once, which counts
// as a synchronisation, as it is one on a real device.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "memory.h"
#include "runtime.h"
#include "scheduler.h"

namespace simulated {

namespace {

using torch::jit::Stack;

bool is_ours(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == c10::DeviceType::PrivateUse1;
}

// What is needed to see a tensor's memory as a CPU tensor later, when the tensor may be gone.
struct View {
  void* address;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
  bool is_conj, is_neg;

  static View of(const at::Tensor& tensor) {
    void* address = const_cast<void*>(tensor.const_data_ptr());
    if (is_ours(tensor))
      address = DeviceMemory::get().on_device(address);
    return {address,          tensor.sizes().vec(), tensor.strides().vec(), tensor.scalar_type(),
            tensor.is_conj(), tensor.is_neg()};
  }

  at::Tensor tensor() const {
    auto made = at::from_blob(address, sizes, strides, at::TensorOptions().dtype(dtype));
    made._set_conj(is_conj);
    made._set_neg(is_neg);
    return made;
  }
};

// For operators of a stream: no autograd, whoever runs them.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView guard;
  at::NoGradGuard no_grad;
};

// -- memory -----------------------------------------------------------------------------------------------------

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

int index_of(std::optional<c10::Device> device) {
  return device.has_value() && device->has_index() ? device->index() : current_device();
}

struct OnDevice {
  explicit OnDevice(int device) : before(current_device()) {
    set_current_device(device);
  }
  ~OnDevice() {
    set_current_device(before);
  }
  int before;
};

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const OnDevice on(index_of(device));
  return at::detail::empty_generic(size, device_allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  const OnDevice on(index_of(device));
  return at::detail::empty_strided_generic(size, stride, device_allocator(), kKeys, c10::dtype_or_default(dtype));
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (format.has_value())
    impl->empty_tensor_restride(*format);
  const size_t needed = at::detail::computeStorageNbytes(
      self.sizes(), self.strides(), self.dtype().itemsize(), self.storage_offset());
  if (needed > self.storage().nbytes())
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), needed);
  return self;
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);  // looks at no memory
}

at::Tensor& set_all(at::Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(source), 0, {count}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor reshape_alias(const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::as_strided_tensorimpl(self, size, stride, std::nullopt);
}

void record_stream(at::Tensor& self, at::Stream stream) {
  DeviceMemory::get().record_stream(self.storage().mutable_data(), number_of(stream));
}

// -- copies -----------------------------------------------------------------------------------------------------

void count_copy(const at::Tensor& source, const at::Tensor& target) {
  auto& counters = Scheduler::get().counters();
  const auto nbytes = static_cast<int64_t>(source.numel() * source.element_size());
  if (!is_ours(target)) {
    ++counters.copies_to_host;
    counters.bytes_to_host += nbytes;
  } else if (!is_ours(source)) {
    ++counters.copies_to_device;
    counters.bytes_to_device += nbytes;
  } else {
    ++counters.copies_on_device;
    counters.bytes_on_device += nbytes;
  }
}

void run_copy(const View& source, const View& target) {
  const BelowAutograd below;
  auto into = target.tensor();
  into.copy_(source.tensor());
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  if (source.numel() == 0)
    return target;
  auto& scheduler = Scheduler::get();
  const Lock lock(scheduler.mutex());
  count_copy(source, target);
  const int64_t stream = current_stream((is_ours(source) ? source : target).device().index());

  if (is_ours(source) && is_ours(target)) {
    // Between devices: in the source's stream, after what the target's stream holds, and the target's stream waits for it.
    const int64_t other = current_stream(target.device().index());
    scheduler.wait(stream, scheduler.here(other));
    scheduler.enqueue(stream, [from = View::of(source), to = View::of(target)] { run_copy(from, to); });
    scheduler.wait(other, scheduler.here(stream));
    return target;
  }

  const at::Tensor& host = is_ours(source) ? target : source;
  auto& pinned = PinnedMemory::get();
  const bool is_pinned = pinned.contains(host.const_data_ptr());
  if (!is_ours(source) && !is_pinned) {
    // The driver takes pageable memory before the call returns; the device gets it in the stream's order.
    const BelowAutograd below;
    auto taken = std::make_shared<at::Tensor>(View::of(source).tensor().clone());
    scheduler.enqueue(stream, [taken, to = View::of(target)] { run_copy(View::of(*taken), to); });
    if (!non_blocking) {
      ++scheduler.counters().blocking_copies;
      scheduler.finish_stream(stream);
    }
    return target;
  }
  scheduler.enqueue(stream, [from = View::of(source), to = View::of(target)] { run_copy(from, to); });
  if (is_pinned && non_blocking) {
    pinned.in_use_until(host.const_data_ptr(), scheduler.here(stream));
  } else {
    ++scheduler.counters().blocking_copies;
    scheduler.finish_stream(stream);
  }
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

// -- every other operator ---------------------------------------------------------------------------------------

// Calls `of` for every tensor in a value, and returns the value with what it returns in its place.
template <class Of>
c10::IValue mapped(const c10::IValue& value, const Of& of) {
  if (value.isTensor())
    return value.toTensor().defined() ? of(value.toTensor()) : value;
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector())
      list.push_back(of(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
      list.push_back(tensor.has_value() && tensor->defined() ? std::optional<at::Tensor>(of(*tensor)) : tensor);
    return list;
  }
  return value;
}

std::optional<int> device_of(const Stack& arguments) {
  std::optional<int> found;
  for (const auto& argument : arguments) {
    mapped(argument, [&](const at::Tensor& tensor) {
      if (is_ours(tensor) && !found.has_value())
        found = tensor.device().index();
      return tensor;
    });
    if (argument.isDevice() && !found.has_value())
      found = index_of(argument.toDevice());
  }
  return found;
}

c10::IValue to_device_type(const c10::Argument& argument, const c10::IValue& value, c10::DeviceType type, int device) {
  const bool is_device = value.isDevice();
  if (is_device)
    return c10::Device(type);
  const bool is_generator = argument.type()->str().find("Generator") != std::string::npos;
  if (is_generator && type == c10::DeviceType::CPU && value.isNone())
    return generator(device);
  if (is_generator && type == c10::DeviceType::Meta)
    return c10::IValue();
  return value;
}

bool writes(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

at::Tensor as_meta(const at::Tensor& tensor) {
  return at::empty_strided(
      tensor.sizes(), tensor.strides(), tensor.options().device(c10::DeviceType::Meta).requires_grad(false));
}

bool is_tensors(const c10::IValue& value) {
  return value.isTensor() || value.isTensorList();
}

// A call whose tensors are views by address, so that it can be made later.
struct Call {
  c10::OperatorHandle op;
  Stack arguments;                               // tensors are replaced by empty places
  std::vector<std::vector<std::optional<View>>> views;  // of each argument

  Call(const c10::OperatorHandle& op, const Stack& given, int device) : op(op) {
    const auto& formal = op.schema().arguments();
    for (size_t i = 0; i < given.size(); ++i) {
      std::vector<std::optional<View>> of_argument;
      std::vector<at::Tensor> kept;
      mapped(given[i], [&](const at::Tensor& tensor) {
        at::Tensor seen = tensor;
        if (!is_ours(tensor))  // a number in a tensor, or an index: the device gets its value with the call
          kept.push_back(seen = tensor.clone());
        of_argument.emplace_back(View::of(seen));
        return tensor;
      });
      host_values.insert(host_values.end(), kept.begin(), kept.end());
      const bool has_tensors = !of_argument.empty();
      arguments.push_back(
          has_tensors ? given[i] : to_device_type(formal[i], given[i], c10::DeviceType::CPU, device));
      views.push_back(std::move(of_argument));
      if (has_tensors)  // its place only; the tensors would keep their memory
        arguments.back() = mapped(given[i], [](const at::Tensor&) { return at::Tensor(at::empty({0})); });
    }
  }

  Stack run() const {
    const BelowAutograd below;
    Stack stack;
    for (size_t i = 0; i < arguments.size(); ++i) {
      size_t next = 0;
      stack.push_back(mapped(arguments[i], [&](const at::Tensor&) { return views[i][next++]->tensor(); }));
    }
    op.callBoxed(&stack);
    return stack;
  }

  std::vector<at::Tensor> host_values;
};

// The outputs of the operator, as meta tensors; nothing if it has none without values.
std::optional<Stack> outputs_of(const c10::OperatorHandle& op, const Stack& given, int device) {
  const auto& formal = op.schema().arguments();
  Stack stack;
  for (size_t i = 0; i < given.size(); ++i)
    stack.push_back(mapped(to_device_type(formal[i], given[i], c10::DeviceType::Meta, device), as_meta));
  try {
    const BelowAutograd below;
    op.callBoxed(&stack);
  } catch (const std::exception&) {  // it depends on values, or has no meta kernel
    return std::nullopt;
  }
  for (const auto& output : stack)
    if (!is_tensors(output))
      return std::nullopt;
  return stack;
}

// What an output of the CPU's operator is on the device: an argument, a view of one, or new.
at::Tensor on_device(const at::Tensor& output, const Stack& given, int device) {
  at::Tensor found;
  for (const auto& argument : given) {
    mapped(argument, [&](const at::Tensor& tensor) {
      if (!found.defined() && is_ours(tensor) && tensor.storage().nbytes() > 0) {
        auto* first = static_cast<char*>(DeviceMemory::get().on_device(tensor.storage().mutable_data()));
        auto* start = static_cast<char*>(const_cast<void*>(output.const_data_ptr()));
        if (start >= first && start < first + tensor.storage().nbytes() && output.numel() > 0) {
          const auto offset = (start - first) / static_cast<int64_t>(output.element_size());
          found = at::native::as_strided_tensorimpl(tensor, output.sizes(), output.strides(), offset);
        }
      }
      return tensor;
    });
  }
  if (!found.defined()) {
    const OnDevice on(device);
    found = empty_strided(output.sizes(), output.strides(), output.scalar_type(), {}, {}, {});
    run_copy(View::of(output), View::of(found));
  }
  return found;
}

void run_now(const c10::OperatorHandle& op, Stack* stack, const Stack& given, int device, bool waits) {
  auto& scheduler = Scheduler::get();
  if (waits) {
    ++scheduler.counters().synchronizations;
    scheduler.finish_stream(current_stream(device));
  }
  const Stack results = Call(op, given, device).run();
  const auto& returns = op.schema().returns();
  for (size_t i = 0; i < results.size(); ++i) {
    const auto* alias = returns[i].alias_info();
    if (alias != nullptr && alias->isWrite()) {  // an argument itself
      for (size_t k = 0; k < given.size(); ++k) {
        const auto* of_argument = op.schema().arguments()[k].alias_info();
        if (of_argument != nullptr && of_argument->isWrite() && of_argument->beforeSets() == alias->beforeSets())
          stack->push_back(given[k]);
      }
    } else {
      stack->push_back(mapped(results[i], [&](const at::Tensor& t) { return on_device(t, given, device); }));
    }
  }
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  const Stack given(stack->end() - static_cast<int64_t>(count), stack->end());
  stack->erase(stack->end() - static_cast<int64_t>(count), stack->end());
  const int device = device_of(given).value_or(current_device());
  const bool is_view = std::any_of(schema.returns().begin(), schema.returns().end(), [](const c10::Argument& one) {
    return one.alias_info() != nullptr && !one.alias_info()->isWrite();
  });
  const bool has_written = std::any_of(schema.arguments().begin(), schema.arguments().end(), writes);
  // Without the lock: some meta kernels are written in Python, and whoever has Python's lock may be waiting for ours.
  const auto outputs = is_view ? std::nullopt : outputs_of(op, given, device);
  auto& scheduler = Scheduler::get();
  const Lock lock(scheduler.mutex());
  if (is_view)  // it computes nothing
    return run_now(op, stack, given, device, false);
  ++scheduler.counters().kernels;
  if (!outputs.has_value() && !(has_written && schema.returns().empty()))
    return run_now(op, stack, given, device, true);

  const int64_t stream = current_stream(device);
  if (has_written) {
    // Its results are arguments. Those that it makes larger (out=) have to be so before the call is put together.
    for (size_t i = 0; i < schema.returns().size(); ++i) {
      for (size_t k = 0; k < count; ++k) {
        const auto* alias = schema.returns()[i].alias_info();
        const auto* of_argument = schema.arguments()[k].alias_info();
        if (alias == nullptr || of_argument == nullptr || alias->beforeSets() != of_argument->beforeSets())
          continue;
        if (given[k].isTensor() && (*outputs)[i].isTensor() &&
            given[k].toTensor().sizes() != (*outputs)[i].toTensor().sizes())
          resize_(given[k].toTensor(), (*outputs)[i].toTensor().sizes(), std::nullopt);
        stack->push_back(given[k]);
      }
    }
    scheduler.enqueue(stream, [call = std::make_shared<Call>(op, given, device)] { call->run(); });
    return;
  }

  std::vector<View> targets;
  const OnDevice on(device);
  for (const auto& output : *outputs) {
    stack->push_back(mapped(output, [&](const at::Tensor& meta) {
      auto made = empty_strided(meta.sizes(), meta.strides(), meta.scalar_type(), {}, {}, {});
      targets.push_back(View::of(made));
      return made;
    }));
  }
  scheduler.enqueue(stream, [call = std::make_shared<Call>(op, given, device), targets] {
    size_t next = 0;
    for (const auto& result : call->run())
      mapped(result, [&](const at::Tensor& tensor) {
        run_copy(View::of(tensor), targets[next++]);
        return tensor;
      });
  });
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// Copies take conjugate and negative views as they are; resolving one first would copy it, and so on for ever.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, Negative, library) {
  library.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("resize_", &resize_);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("set_.source_Storage", &set_all);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("record_stream", &record_stream);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  // Composite elsewhere: one kernel for many tensors, as real devices have it.
  for (const char* name :
       {"_foreach_copy_", "_foreach_add_.Scalar", "_foreach_add_.List", "_foreach_mul_.Scalar", "_foreach_zero_",
        "_foreach_lerp_.Scalar", "_foreach_addcmul_.Scalar", "_foreach_addcdiv_.ScalarList", "_foreach_sqrt",
        "_foreach_div_.ScalarList", "_foreach_add_.ScalarList", "_foreach_mul_.List", "_foreach_norm.Scalar"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace

}  // namespace simulated
