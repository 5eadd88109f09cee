#undef SET
#undef LANES
#undef ROWS
#undef OUTS
#undef WIDTH
#undef IN_REGISTER
