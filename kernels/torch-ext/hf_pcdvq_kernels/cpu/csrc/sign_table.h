// The signs of eight weights, as bytes of 1 or -1, for every value of the seven sign bits of PCDVQ.
#pragma once

struct SignTable {
    uint64_t entries[128];

    constexpr SignTable() : entries() {
        for (unsigned seven = 0; seven < 128; seven++) {
            unsigned parity = 0;
            for (int bit = 0; bit < 7; bit++) parity ^= seven >> bit & 1;
            const unsigned negative = seven | parity << 7;
            for (int i = 0; i < 8; i++) entries[seven] |= (uint64_t)(negative >> i & 1 ? 0xFF : 1) << (8 * i);
        }
    }
};

static constexpr SignTable SIGN_TABLE;
