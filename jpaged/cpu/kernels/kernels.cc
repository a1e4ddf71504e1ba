// All kernels as one unit, so that a compiler reads XLA's headers once.
#include "attention.cc"
#include "pages.cc"
#include "products.cc"
