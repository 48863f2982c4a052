# The instruction-set levels: which this compiler and machine type can build, with what flags, and how their code is
# kept apart.
#
# A level's object file holds inline functions of the C++ library and of our headers, compiled with instructions other
# machines lack. A linker keeps one copy of such a function for the whole library, whichever it meets first. So each
# level is linked with itself first (ld -r), its groups dissolved, and all its symbols but the one of its table of
# functions made local: nothing outside a level can call into its code by accident. Without GNU ld and objcopy only the
# portable level is built, which needs no such care.
include(CheckCXXCompilerFlag)

set(LOWLAT_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx512vnni -mavx512vbmi -mfma -mf16c -mavx2)
set(LOWLAT_FLAGS_amx ${LOWLAT_FLAGS_avx512} -mamx-tile -mamx-bf16 -mamx-int8)
set(LOWLAT_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(LOWLAT_FLAGS_neon)
set(LOWLAT_FLAGS_portable)

# Levels this build has, best first.
function(lowlat_built_levels result)
  set(levels)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    execute_process(COMMAND ${CMAKE_LINKER} --help OUTPUT_VARIABLE linker_help ERROR_QUIET)
    if(NOT CMAKE_OBJCOPY OR NOT linker_help MATCHES "force-group-allocation")
      message(WARNING "GNU ld and objcopy are needed for the AVX2 and AVX-512 levels: building the portable one alone")
    else()
      foreach(level amx avx512 avx2)
        string(JOIN " " CMAKE_REQUIRED_FLAGS ${LOWLAT_FLAGS_${level}})
        check_cxx_source_compiles("int main() { return 0; }" LOWLAT_COMPILES_${level})
        if(LOWLAT_COMPILES_${level})
          list(APPEND levels ${level})
        endif()
      endforeach()
    endif()
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
    set(levels neon)
  endif()
  set(${result} ${levels} portable PARENT_SCOPE)
endfunction()

# An object library of one level, with its flags; for csrc/CMakeLists.txt.
function(lowlat_level_library level)
  add_library(level_${level} OBJECT level.cpp)
  string(TOUPPER ${level} upper)
  target_compile_definitions(level_${level} PRIVATE LOWLAT_${upper})
  # Contraction is left to the explicit fma of the kernels, so that a level gives the same bits with any compiler.
  target_compile_options(level_${level} PRIVATE ${LOWLAT_FLAGS_${level}} -ffp-contract=off -Wall -Wextra -Wno-psabi)
endfunction()

# One relocatable object with a single visible symbol.
function(lowlat_isolate level result)
  set(joined ${CMAKE_CURRENT_BINARY_DIR}/level_${level}.o)
  add_custom_command(
    OUTPUT ${joined}
    COMMAND ${CMAKE_LINKER} -r --force-group-allocation -o ${joined}.all $<TARGET_OBJECTS:level_${level}>
    COMMAND ${CMAKE_OBJCOPY} --keep-global-symbol=lowlat_ops_${level} ${joined}.all ${joined}
    DEPENDS level_${level} $<TARGET_OBJECTS:level_${level}>
    COMMAND_EXPAND_LISTS VERBATIM)
  set_source_files_properties(${joined} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  set(${result} ${joined} PARENT_SCOPE)
endfunction()

# Objects of all levels to link, and the definitions that tell dispatch.cpp which there are.
function(lowlat_levels objects definitions)
  lowlat_built_levels(levels)
  message(STATUS "lowlat levels: ${levels}")
  add_subdirectory(csrc)
  set(all_objects)
  set(all_definitions)
  foreach(level ${levels})
    if("${LOWLAT_FLAGS_${level}}" STREQUAL "") # the instructions of everything else
      list(APPEND all_objects $<TARGET_OBJECTS:level_${level}>)
    else()
      lowlat_isolate(${level} object)
      list(APPEND all_objects ${object})
    endif()
    string(TOUPPER ${level} upper)
    list(APPEND all_definitions LOWLAT_HAS_${upper})
  endforeach()
  set(${objects} ${all_objects} PARENT_SCOPE)
  set(${definitions} ${all_definitions} PARENT_SCOPE)
endfunction()
