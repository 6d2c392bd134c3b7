"""Sans-IO protocol parts: no trio, no libp2p, no clock, no randomness. Time comes in as an argument."""
