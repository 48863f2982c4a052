// Run-time dispatch by instruction set: the levels that this build and this machine support, and the one in use.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "ops.h"

namespace lowlat {

// Levels in this build, best first.
std::vector<std::string> built_levels();

// Built levels that this machine and its operating system can run, best first. Never empty: portable runs everywhere.
std::vector<std::string> usable_levels();

// The function table of a level; an empty name means the level in use. Throws std::invalid_argument for one that
// cannot run here.
const Ops& ops(std::string_view level = {});

// Sets the level in use. Initially it is the best usable one.
void set_level(const std::string& level);

}  // namespace lowlat
