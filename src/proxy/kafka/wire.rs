//! The forms in which Kafka's protocol writes values, in its older and in its flexible versions.

/// No array of a request that is read has more elements.
const ELEMENTS_MAX: usize = 100_000;

/// Reads values from the front; `None`: the bytes are not of that form.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    start: usize,
    is_flexible: bool,
}

impl<'a> Reader<'a> {
    /// In the older form.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, start: bytes.len(), is_flexible: false }
    }

    /// In this form from here on.
    pub fn flexible(mut self, is_flexible: bool) -> Self {
        self.is_flexible = is_flexible;
        self
    }

    /// How many bytes were read.
    pub fn place(&self) -> usize {
        self.start - self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub fn skip(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(count)?;
        self.bytes = rest;
        Some(taken)
    }

    pub fn i8(&mut self) -> Option<i8> {
        Some(i8::from_be_bytes(self.skip(1)?.try_into().ok()?))
    }

    pub fn i16(&mut self) -> Option<i16> {
        Some(i16::from_be_bytes(self.skip(2)?.try_into().ok()?))
    }

    pub fn i32(&mut self) -> Option<i32> {
        Some(i32::from_be_bytes(self.skip(4)?.try_into().ok()?))
    }

    /// A number in groups of seven bits, the lowest first.
    fn varint(&mut self) -> Option<u32> {
        let mut value = 0_u64;
        for group in 0..5 {
            let byte = self.skip(1)?[0];
            value |= u64::from(byte & 0x7f) << (7 * group);
            if byte & 0x80 == 0 {
                return u32::try_from(value).ok();
            }
        }
        None
    }

    /// A length of which one value means that there is nothing.
    fn length(&mut self, is_wide: bool) -> Option<Option<usize>> {
        let length = match (self.is_flexible, is_wide) {
            (true, _) => i64::from(self.varint()?) - 1,
            (false, true) => i64::from(self.i32()?),
            (false, false) => i64::from(self.i16()?),
        };
        match length {
            -1 => Some(None),
            length => Some(Some(usize::try_from(length).ok()?)),
        }
    }

    pub fn nullable_string(&mut self) -> Option<Option<String>> {
        match self.length(false)? {
            None => Some(None),
            Some(length) => Some(Some(String::from_utf8(self.skip(length)?.to_vec()).ok()?)),
        }
    }

    pub fn string(&mut self) -> Option<String> {
        self.nullable_string()?
    }

    pub fn bytes(&mut self) -> Option<()> {
        let length = self.length(true)?.unwrap_or(0);
        self.skip(length).map(drop)
    }

    /// Each element of an array, which may be missing; the tags behind an element are read, too.
    pub fn array<T>(&mut self, mut element: impl FnMut(&mut Self) -> Option<T>) -> Option<Option<Vec<T>>> {
        let Some(count) = self.length(true)? else { return Some(None) };
        if count > ELEMENTS_MAX {
            return None;
        }
        let mut elements = Vec::new();
        for _ in 0..count {
            // An element that takes no bytes would let a short message name many.
            let before = self.bytes.len();
            elements.push(element(self)?);
            if self.bytes.len() == before {
                return None;
            }
        }
        Some(Some(elements))
    }

    /// Fields that newer versions may add.
    pub fn tags(&mut self) -> Option<()> {
        if !self.is_flexible {
            return Some(());
        }
        for _ in 0..self.varint()? {
            self.varint()?;
            let length = usize::try_from(self.varint()?).ok()?;
            self.skip(length)?;
        }
        Some(())
    }
}

/// Writes values.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    is_flexible: bool,
}

impl Writer {
    pub fn new(is_flexible: bool) -> Self {
        Self { bytes: Vec::new(), is_flexible }
    }

    /// The message with its length before it.
    pub fn framed(self) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        [&length.to_be_bytes()[..], &self.bytes].concat()
    }

    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    pub fn i16(&mut self, value: i16) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    pub fn i32(&mut self, value: i32) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    pub fn i64(&mut self, value: i64) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    fn varint(&mut self, mut value: usize) -> &mut Self {
        while value > 0x7f {
            // Seven bits and the mark that more follow.
            self.bytes.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
        self
    }

    pub fn string(&mut self, text: &str) -> &mut Self {
        if self.is_flexible {
            self.varint(text.len() + 1);
        } else {
            self.i16(i16::try_from(text.len()).unwrap_or(i16::MAX));
        }
        self.raw(text.as_bytes())
    }

    pub fn null_string(&mut self) -> &mut Self {
        if self.is_flexible { self.varint(0) } else { self.i16(-1) }
    }

    /// Bytes or an array that are not there.
    pub fn null(&mut self) -> &mut Self {
        if self.is_flexible { self.varint(0) } else { self.i32(-1) }
    }

    pub fn array<T>(&mut self, elements: &[T], mut write: impl FnMut(&mut Self, &T)) -> &mut Self {
        if self.is_flexible {
            self.varint(elements.len() + 1);
        } else {
            self.i32(i32::try_from(elements.len()).unwrap_or(i32::MAX));
        }
        for element in elements {
            write(self, element);
            self.tags();
        }
        self
    }

    pub fn tags(&mut self) -> &mut Self {
        if self.is_flexible { self.varint(0) } else { self }
    }
}
