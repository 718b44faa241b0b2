// Streams, events, and when the operations that were put into streams run.
//
// NOTE [ When an operation runs ]
// A stream is a queue. An operation may run once all that stands before it in its queue has run; a wait has run once the
// event that it waits for has. A device promises no more than that, so a program that depends on more has a bug, which a
// real device shows once a month. Here operations run at the worst moment that the promise allows, always the same one:
//
//   late      only when the host waits for them, or when one that it waits for depends on them
//   early     at once, within the call that puts them into the stream
//   ahead     those of default streams at once, those of other streams late: the trainer is ahead of its side streams
//   behind    those of default streams late, those of other streams at once
//   seed N    at every call into the device, each stream runs none, some or all of its operations, drawn from the seed
//
// There are no threads: whoever calls into the device runs what has to run then. So every mode is deterministic for a
// program of one thread, and the same seed gives the same order.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

namespace simulated {

constexpr int kDevices = 2;

// What has happened, since the counters were reset.
struct Counters {
  int64_t kernels = 0;
  int64_t copies_to_host = 0, bytes_to_host = 0;
  int64_t copies_to_device = 0, bytes_to_device = 0;
  int64_t copies_on_device = 0, bytes_on_device = 0;
  int64_t synchronizations = 0;     // the host asked for the end of a stream, an event or a device
  int64_t blocking_copies = 0;      // the host had to wait for a copy: not pinned, or not non_blocking
  int64_t waits = 0;                // a stream was told to wait for another stream
  int64_t waits_of_default = 0;     // of these, a default stream, which is where a program trains
};

// A point in a stream: the first `position` operations of the stream.
struct Point {
  int64_t stream = -1;
  uint64_t position = 0;
};

// The lock of the simulator. Whoever runs an operation holds it, and may need Python's lock (a tensor that Python knows is
// counted under it); so nobody waits for this one and keeps Python's.
class Lock {
 public:
  explicit Lock(std::recursive_mutex& mutex);
  ~Lock() {
    mutex_.unlock();
  }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  std::recursive_mutex& mutex_;
};

class Scheduler {
 public:
  static Scheduler& get();

  void set_mode(const std::string& name, uint64_t seed);
  std::string mode() const;

  int64_t new_stream(int device);
  static int64_t default_stream(int device) { return device; }
  int device_of(int64_t stream) const;

  void enqueue(int64_t stream, std::function<void()> run);
  void wait(int64_t stream, Point until);
  Point here(int64_t stream) const;

  bool done(Point point) const;
  // As done(), for a program that asks again and again: the stream goes on a little each time that it says no.
  bool query(Point point);
  void finish(Point point);
  void finish_stream(int64_t stream);
  void finish_device(int device);

  std::recursive_mutex& mutex() { return mutex_; }
  Counters& counters() { return counters_; }

 private:
  enum class Mode { Late, Early, Ahead, Behind, Seed };

  struct Operation {
    std::function<void()> run;
    Point until;  // of a wait
  };

  struct Stream {
    int device;
    std::deque<Operation> queue;
    uint64_t done = 0;
    uint64_t issued() const { return done + queue.size(); }
  };

  Scheduler();
  void run_to(int64_t stream, uint64_t position);
  void progress(int64_t enqueued);

  mutable std::recursive_mutex mutex_;
  std::vector<std::unique_ptr<Stream>> streams_;
  Counters counters_;
  Mode mode_ = Mode::Late;
  uint64_t seed_ = 0;
  std::mt19937_64 random_;
};

}  // namespace simulated
