// What fastres/_C takes from libfastres.so; all else in the library is hidden.
#pragma once

#define FASTRES_EXPORTED __attribute__((visibility("default")))
