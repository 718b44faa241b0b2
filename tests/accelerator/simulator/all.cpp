// All of it as one unit: most of what the compiler reads are torch's headers, and each unit has them anew.
#include "memory.cpp"
#include "module.cpp"
#include "operators.cpp"
#include "runtime.cpp"
#include "scheduler.cpp"
