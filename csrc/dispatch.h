// Which levels of instructions this build and this machine have, and which one is in use.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "ops.h"

namespace lowlat {

// Levels in this build, best first.
std::vector<std::string> built_levels();

// Those of them this machine and its operating system can run, best first. Never empty: portable runs everywhere.
std::vector<std::string> usable_levels();

// The table of a level; empty name: the one in use. Throws std::invalid_argument for one that cannot run here.
const Ops& ops(std::string_view level = {});

// Chooses the level in use; at first it is the best usable one.
void set_level(const std::string& level);

}  // namespace lowlat
