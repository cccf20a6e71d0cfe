// Every instruction set is there. Included before everything else.
#pragma once

#include <cpuid.h>

#define __builtin_cpu_supports(name) 1
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) (*(a) = 1 << 4, 1)
