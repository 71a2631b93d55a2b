/* HQQ: the codes of a packed row, one in each byte. The layout is defined in bitpack/reference.py. */

/* Unpacked codes are stored minus the middle of their range, so that they fit int8 and are close to their zero point. */
INLINE int centre_of(int nbits) {
    return 1 << (nbits - 1);
}

/* Puts one plane of a row, `width` bits a code, into the codes, `shift` bits up. The first plane (shift 0) sets them,
 * minus `centre`; the later ones are added. */
INLINE void unpack_plane(const uint8_t *plane, int64_t columns, int width, int shift, int centre, int8_t *codes) {
    const int64_t plane_bytes = (columns * width + 7) / 8;
    const uint8_t mask = (uint8_t)((1 << width) - 1);
    for (int slot = 0; slot < 8 / width; slot++) {
        const int64_t start = slot * plane_bytes, left = columns - start, n = left < plane_bytes ? left : plane_bytes;
        uint8_t *into = (uint8_t *)codes + start;
        int64_t b = 0;
        for (; b + (int64_t)sizeof(words) <= n; b += sizeof(words)) {
            /* Bits that a shift of whole words brings in from the next byte are masked away. */
            words bits = (*(const words_at *)(plane + b) >> (slot * width)) & (0x0101010101010101u * mask);
            bytes added = (bytes)(bits << shift);
            if (shift == 0)
                *(bytes_at *)(into + b) = added - (uint8_t)centre;
            else
                *(bytes_at *)(into + b) += added;
        }
        for (; b < n; b++) {
            uint8_t added = (uint8_t)(((plane[b] >> (slot * width)) & mask) << shift);
            into[b] = (uint8_t)(shift == 0 ? added - centre : into[b] + added);
        }
    }
}

/* The codes of one row minus their centre; `width` and `shift` are constants in every call, and so in its loops. */
INLINE void unpack_row(const uint8_t *packed, int64_t columns, int nbits, int8_t *codes) {
    const int centre = centre_of(nbits);
    switch (nbits) {
    case 1: unpack_plane(packed, columns, 1, 0, centre, codes); break;
    case 2: unpack_plane(packed, columns, 2, 0, centre, codes); break;
    case 4: unpack_plane(packed, columns, 4, 0, centre, codes); break;
    case 8: unpack_plane(packed, columns, 8, 0, centre, codes); break;
    case 3:
        unpack_plane(packed, columns, 2, 0, centre, codes);
        unpack_plane(packed + (columns * 2 + 7) / 8, columns, 1, 2, centre, codes);
        break;
    case 5:
        unpack_plane(packed, columns, 4, 0, centre, codes);
        unpack_plane(packed + (columns * 4 + 7) / 8, columns, 1, 4, centre, codes);
        break;
    case 6:
        unpack_plane(packed, columns, 4, 0, centre, codes);
        unpack_plane(packed + (columns * 4 + 7) / 8, columns, 2, 4, centre, codes);
        break;
    }
}
