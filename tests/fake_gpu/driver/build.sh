#!/bin/bash
# Builds the fake driver: build.sh OUTPUT/libcuda.so.1 FOLDER_OF_HEADERS...
set -euo pipefail
here=$(dirname "$0") output=$1
shift
# Only what other libraries are to find is exported; the rest must not meet torch's own names.
${CXX:-g++} -std=c++17 -O1 -shared -fPIC -fvisibility=hidden -Wall -Wextra \
    -I"$here" "${@/#/-isystem}" -Wl,-soname,libcuda.so.1 -o "$output" "$here"/*.cpp -ldl
