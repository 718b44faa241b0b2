#include <Python.h>

#include "scheduler.h"

#include <stdexcept>

namespace simulated {

Lock::Lock(std::recursive_mutex& mutex) : mutex_(mutex) {
  if (mutex_.try_lock())
    return;
  if (Py_IsInitialized() && PyGILState_Check()) {
    PyThreadState* const state = PyEval_SaveThread();
    mutex_.lock();
    PyEval_RestoreThread(state);
  } else {
    mutex_.lock();
  }
}

Scheduler& Scheduler::get() {
  static auto* scheduler = new Scheduler();  // never destroyed: tensors may die after it would be
  return *scheduler;
}

Scheduler::Scheduler() {
  for (int device = 0; device < kDevices; ++device)
    new_stream(device);
}

void Scheduler::set_mode(const std::string& name, uint64_t seed) {
  Lock lock(mutex_);
  if (name == "late") mode_ = Mode::Late;
  else if (name == "early") mode_ = Mode::Early;
  else if (name == "ahead") mode_ = Mode::Ahead;
  else if (name == "behind") mode_ = Mode::Behind;
  else if (name == "seed") mode_ = Mode::Seed;
  else throw std::invalid_argument("no mode " + name + "; there are late, early, ahead, behind, seed");
  // What is in the queues was put there under another rule.
  for (int device = 0; device < kDevices; ++device)
    finish_device(device);
  seed_ = seed;
  random_.seed(seed);
}

std::string Scheduler::mode() const {
  Lock lock(mutex_);
  switch (mode_) {
    case Mode::Late: return "late";
    case Mode::Early: return "early";
    case Mode::Ahead: return "ahead";
    case Mode::Behind: return "behind";
    case Mode::Seed: return "seed " + std::to_string(seed_);
  }
  return "";
}

int64_t Scheduler::new_stream(int device) {
  Lock lock(mutex_);
  streams_.push_back(std::make_unique<Stream>(Stream{device, {}, 0}));
  return static_cast<int64_t>(streams_.size()) - 1;
}

int Scheduler::device_of(int64_t stream) const {
  Lock lock(mutex_);
  return streams_.at(stream)->device;
}

void Scheduler::enqueue(int64_t stream, std::function<void()> run) {
  Lock lock(mutex_);
  streams_.at(stream)->queue.push_back({std::move(run), {}});
  progress(stream);
}

void Scheduler::wait(int64_t stream, Point until) {
  Lock lock(mutex_);
  if (until.stream < 0 || until.stream == stream)
    return;
  ++counters_.waits;
  if (stream < kDevices)
    ++counters_.waits_of_default;
  streams_.at(stream)->queue.push_back({nullptr, until});
  progress(stream);
}

Point Scheduler::here(int64_t stream) const {
  Lock lock(mutex_);
  return {stream, streams_.at(stream)->issued()};
}

bool Scheduler::done(Point point) const {
  Lock lock(mutex_);
  return point.stream < 0 || streams_.at(point.stream)->done >= point.position;
}

bool Scheduler::query(Point point) {
  Lock lock(mutex_);
  if (done(point))
    return true;
  run_to(point.stream, streams_.at(point.stream)->done + 1);
  return false;
}

void Scheduler::finish(Point point) {
  Lock lock(mutex_);
  if (point.stream >= 0)
    run_to(point.stream, point.position);
}

void Scheduler::finish_stream(int64_t stream) {
  Lock lock(mutex_);
  run_to(stream, streams_.at(stream)->issued());
}

void Scheduler::finish_device(int device) {
  Lock lock(mutex_);
  for (size_t stream = 0; stream < streams_.size(); ++stream)
    if (streams_[stream]->device == device)
      finish_stream(static_cast<int64_t>(stream));
}

void Scheduler::run_to(int64_t number, uint64_t position) {
  Stream& stream = *streams_.at(number);
  while (stream.done < position && !stream.queue.empty()) {
    Operation& next = stream.queue.front();
    if (next.run)
      next.run();
    else
      run_to(next.until.stream, next.until.position);
    // A point stands in queues only after what it names was enqueued, so this recursion ends.
    stream.queue.pop_front();
    ++stream.done;
  }
}

void Scheduler::progress(int64_t enqueued) {
  const bool is_default = enqueued < kDevices;
  switch (mode_) {
    case Mode::Late:
      return;
    case Mode::Early:
      return finish_stream(enqueued);
    case Mode::Ahead:
      if (is_default) finish_stream(enqueued);
      return;
    case Mode::Behind:
      if (!is_default) finish_stream(enqueued);
      return;
    case Mode::Seed:
      for (size_t number = 0; number < streams_.size(); ++number) {
        Stream& stream = *streams_[number];
        if (stream.queue.empty())
          continue;
        const auto draw = random_() % 4;  // half of the time nothing: the longer a queue, the worse the surprise
        if (draw == 2)
          run_to(static_cast<int64_t>(number), stream.done + 1 + random_() % stream.queue.size());
        if (draw == 3)
          finish_stream(static_cast<int64_t>(number));
      }
  }
}

}  // namespace simulated
