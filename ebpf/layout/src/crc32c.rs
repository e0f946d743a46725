//! SCTP's checksum (RFC 9260, appendix A) after a change of its first four bytes, the ports, without reading the rest.
//!
//! A CRC is linear: two packets that differ in some bits have checksums that differ by the CRC of those bits alone, whatever the
//! other bytes are. Zeros that follow multiply by a power of x, and powers of two of those are tables.

/// Castagnoli's polynomial, reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// Packets are shorter than 2^16 bytes.
const POWERS: usize = 16;

/// `TABLES[k][i][n]`: what the nibble `n` at place `i` of a register becomes once 2^k zero bytes have passed.
static TABLES: [[[u32; 16]; 8]; POWERS] = tables();

const fn one_zero_byte(mut register: u32) -> u32 {
    let mut bit = 0;
    while bit < 8 {
        register = if register & 1 == 1 { register >> 1 ^ POLYNOMIAL } else { register >> 1 };
        bit += 1;
    }
    register
}

const fn apply(table: &[[u32; 16]; 8], register: u32) -> u32 {
    let mut result = 0;
    let mut place = 0;
    while place < 8 {
        result ^= table[place][(register >> (4 * place) & 15) as usize];
        place += 1;
    }
    result
}

const fn tables() -> [[[u32; 16]; 8]; POWERS] {
    let mut tables = [[[0; 16]; 8]; POWERS];
    let mut power = 0;
    while power < POWERS {
        let mut place = 0;
        while place < 8 {
            let mut nibble = 0;
            while nibble < 16 {
                let register = (nibble as u32) << (4 * place);
                tables[power][place][nibble] = if power == 0 {
                    one_zero_byte(register)
                } else {
                    let before = &tables[power - 1];
                    apply(before, apply(before, register))
                };
                nibble += 1;
            }
            place += 1;
        }
        power += 1;
    }
    tables
}

/// The checksum, as its field reads in little-endian order, of a packet of `len` bytes (from the SCTP header on) that had
/// `checksum` before its first four bytes were changed by `difference` (old XOR new, read in little-endian order).
#[inline(always)]
pub fn mend(checksum: u32, difference: u32, len: u16) -> u32 {
    let mut register = difference;
    let mut power = 0;
    while power < POWERS {
        if len >> power & 1 == 1 {
            register = apply(&TABLES[power], register);
        }
        power += 1;
    }
    checksum ^ register
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crc32c(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |register, byte| one_zero_byte(register ^ u32::from(*byte)))
    }

    #[test]
    fn the_known_value() {
        // RFC 3720, appendix B.4: 32 bytes of zeros.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn mended_is_as_computed_anew() {
        for len in [12, 13, 28, 64, 1500, 9000, 65535] {
            let mut packet: Vec<u8> = (0..len).map(|i: u32| (i * 31 + len) as u8).collect();
            packet[8..12].fill(0);
            let before = crc32c(&packet);
            let old = u32::from_le_bytes(packet[..4].try_into().unwrap());
            packet[..4].copy_from_slice(&[0x1f, 0x90, 0x75, 0x80]);
            let new = u32::from_le_bytes(packet[..4].try_into().unwrap());
            assert_eq!(mend(before, old ^ new, len as u16), crc32c(&packet), "{len} bytes");
        }
    }
}
