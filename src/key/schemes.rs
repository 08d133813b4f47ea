//! How others make a key of a name: to share locks with what they have written.

use sha2::{Digest, Sha256};

use super::{Key, KeyId};

/// # Names as others hash them
///
/// Between services that use this crate, a plain name is the best key. These are for sharing locks with
/// other programs, and for moving from them one by one. Each is what the other does with a name, and no
/// more; a hash of 32 bits makes two names the same key sooner or later, so share what must be
/// shared.
impl Key {
    /// Makes the key that Ruby's [`with_advisory_lock`] locks: a pair, of 31 bits of the name's CRC-32 and
    /// of 0.
    ///
    /// The second number is what `WITH_ADVISORY_LOCK_PREFIX` is set to, which is mostly nothing. If it
    /// is a number there, make the pair yourself.
    ///
    /// [`with_advisory_lock`]: https://github.com/ClosureTree/with_advisory_lock
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Key;
    ///
    /// let key = Key::with_advisory_lock("my_unique_lock_name");
    /// assert_eq!(key, Key::from((258664313, 0)));
    /// ```
    pub fn with_advisory_lock(name: impl Into<String>) -> Self {
        let name = name.into();
        let id = KeyId::IntPair((crc32(name.as_bytes()) & 0x7fff_ffff).cast_signed(), 0);
        Self { id, name: Some(name.into()) }
    }

    /// Makes the key that the migrations of Ruby on Rails lock in the database of this name.
    ///
    /// Who holds it runs no migrations at the same time. It is named after what it locks, the
    /// migrations of that database.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Key;
    ///
    /// let key = Key::rails_migrations("shop_production");
    /// assert_eq!(key.name(), Some("Rails migrations of shop_production"));
    /// ```
    pub fn rails_migrations(database: impl AsRef<str>) -> Self {
        // ActiveRecord::Migrator::MIGRATOR_SALT. The product of both has less than 63 bits.
        const SALT: i64 = 2_053_462_845;

        let database = database.as_ref();
        let id = KeyId::BigInt(SALT * i64::from(crc32(database.as_bytes())));
        Self { id, name: Some(format!("Rails migrations of {database}").into()) }
    }

    /// Makes the key that Python's [`django-pglocks`] locks before version 2: the name's CRC-32, as a
    /// number with a sign.
    ///
    /// [`django-pglocks`]: https://github.com/Xof/django-pglocks
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Key;
    ///
    /// // The CRC-32 of "123456789" is 0xcbf43926.
    /// assert_eq!(Key::django_pglocks_v1("123456789"), Key::from(0xcbf4_3926_u32.cast_signed()));
    /// ```
    pub fn django_pglocks_v1(name: impl Into<String>) -> Self {
        let name = name.into();
        let id = KeyId::BigInt(crc32(name.as_bytes()).cast_signed().into());
        Self { id, name: Some(name.into()) }
    }

    /// Makes the key that Python's [`django-pglocks`] locks from version 2 on: the first 8 bytes of the
    /// name's SHA-256, the highest first.
    ///
    /// [`django-pglocks`]: https://github.com/Xof/django-pglocks
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Key;
    ///
    /// // The SHA-256 of "abc" begins with ba7816bf 8f01cfea.
    /// let number = 0xba78_16bf_8f01_cfea_u64.cast_signed();
    /// assert_eq!(Key::django_pglocks_v2("abc"), Key::from(number));
    /// ```
    pub fn django_pglocks_v2(name: impl Into<String>) -> Self {
        let name = name.into();
        let id = KeyId::BigInt(i64::from_be_bytes(sha256(&name)));
        Self { id, name: Some(name.into()) }
    }

    /// Makes the key that Python's [`django-pglock`] locks: the first 8 bytes of the name's SHA-256, the
    /// lowest first.
    ///
    /// [`django-pglock`]: https://github.com/Opus10/django-pglock
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Key;
    ///
    /// // The SHA-256 of "abc" begins with ba7816bf 8f01cfea.
    /// let number = 0xeacf_018f_bf16_78ba_u64.cast_signed();
    /// assert_eq!(Key::django_pglock("abc"), Key::from(number));
    /// ```
    pub fn django_pglock(name: impl Into<String>) -> Self {
        let name = name.into();
        let id = KeyId::BigInt(i64::from_le_bytes(sha256(&name)));
        Self { id, name: Some(name.into()) }
    }

    /// Makes the key of `pg_advisory_lock(hashtext(name))`, which is in much hand-written SQL.
    ///
    /// It is computed here, so nothing is sent. PostgreSQL does not document `hashtext`; the function has
    /// been the same from version 8.4 on, and the tests of this crate compare it with servers from 12 to
    /// 18. It hashes the bytes that the server has, so this is right where the database's encoding is
    /// UTF-8 and the server's processor is little-endian, as nearly all are.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Key;
    ///
    /// assert_eq!(Key::hashtext("x"), Key::from(1074944137));
    /// ```
    pub fn hashtext(name: impl Into<String>) -> Self {
        let name = name.into();
        let (_, hash) = lookup3(name.as_bytes());
        let id = KeyId::BigInt(hash.cast_signed().into());
        Self { id, name: Some(name.into()) }
    }

    /// Makes the key of `pg_advisory_lock(hashtextextended(name, 0))`: as [`hashtext`](Self::hashtext), but
    /// of 64 bits.
    ///
    /// # Examples
    ///
    /// ```
    /// use pglock::Key;
    ///
    /// let key = Key::hashtextextended("nightly-report");
    /// assert_eq!(key.name(), Some("nightly-report"));
    /// ```
    pub fn hashtextextended(name: impl Into<String>) -> Self {
        let name = name.into();
        let (high, low) = lookup3(name.as_bytes());
        let id = KeyId::BigInt((u64::from(high) << 32 | u64::from(low)).cast_signed());
        Self { id, name: Some(name.into()) }
    }
}

/// The first 8 bytes.
fn sha256(name: &str) -> [u8; 8] {
    let hash: [u8; 32] = Sha256::digest(name).into();
    hash.first_chunk().copied().unwrap_or_default()
}

/// The CRC-32 of zlib, gzip and Ethernet, bit by bit: names are short.
fn crc32(bytes: &[u8]) -> u32 {
    const REVERSED_POLYNOMIAL: u32 = 0xedb8_8320;

    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (REVERSED_POLYNOMIAL & (crc & 1).wrapping_neg())
        })
    })
}

/// Bob Jenkins' hash [lookup3] as PostgreSQL has it, without a seed: two numbers, the better one last.
///
/// It begins with another number than the original, mixes the same way, and leaves the lowest byte of the
/// third word free when it comes to the last bytes.
///
/// [lookup3]: http://burtleburtle.net/bob/hash/evahash.html
fn lookup3(bytes: &[u8]) -> (u32, u32) {
    const START: u32 = 0x9e37_79b9_u32.wrapping_add(3_923_095);

    // A text of PostgreSQL has less than 1 GB.
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let [mut a, mut b, mut c] = [START.wrapping_add(length); 3];
    let mut blocks = bytes.chunks_exact(12);
    for block in &mut blocks {
        let [first, second, third] = words(block, 0);
        a = a.wrapping_add(first);
        b = b.wrapping_add(second);
        c = c.wrapping_add(third);
        for turn in [4, 6, 8, 16, 19, 4] {
            a = a.wrapping_sub(c) ^ c.rotate_left(turn);
            c = c.wrapping_add(b);
            (a, b, c) = (b, c, a);
        }
    }
    let [first, second, third] = words(blocks.remainder(), 1);
    a = a.wrapping_add(first);
    b = b.wrapping_add(second);
    c = c.wrapping_add(third);
    for turn in [14, 11, 25, 16, 4, 14, 24] {
        c = (c ^ b).wrapping_sub(b.rotate_left(turn));
        (a, b, c) = (b, c, a);
    }
    (a, b)
}

/// Up to 12 bytes as three words, the lowest byte first; `skip` bytes of the third stay free.
fn words(bytes: &[u8], skip: usize) -> [u32; 3] {
    let mut words = [0; 3];
    for (place, &byte) in bytes.iter().enumerate() {
        let place = if place < 8 { place } else { place + skip };
        if let Some(word) = words.get_mut(place / 4) {
            *word |= u32::from(byte) << (8 * (place % 4));
        }
    }
    words
}
