//! Reading the container: nothing in the file is trusted.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::metadata::{Array, Metadata, Value, code};
use super::tensor_type::TensorType;
use super::{ALIGNMENT, ALIGNMENT_KEY, MAGIC, MAX_DIMS, MAX_KEY_BYTES, MAX_NAME_BYTES, VERSION};
use crate::error::{Error, Result};

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Its name, such as `blk.0.attn_k_b.weight`.
    pub name: String,
    /// Its shape, slowest axis first as in numpy; the file has it the other way round.
    pub shape: Vec<usize>,
    /// How its values are stored.
    pub kind: TensorType,
}

/// What stands before the tensors' data, checked against the size of the file.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) metadata: Metadata,
    /// Each tensor and where its bytes lie in the file.
    pub(super) tensors: Vec<(TensorInfo, std::ops::Range<usize>)>,
}

/// An open GGUF file, mapped into memory.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    layout: Layout,
}

impl Gguf {
    /// Opens a file and checks its whole structure: every count against the bytes that are there, every tensor against its
    /// place, and that the file ends where it should.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] with the first thing that is wrong.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|source| Error::io(path, source))?;
        // SAFETY: the mapping is read-only; a file that another process truncates meanwhile is outside what a reader can guard
        // against, and exported files are replaced by rename, never rewritten in place.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::io(path, source))?;
        let layout = Layout::parse(&map).map_err(|why| Error::file(path, why))?;
        Ok(Self { path: path.to_path_buf(), map, layout })
    }

    /// The file's name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keys and values.
    pub fn metadata(&self) -> &Metadata {
        &self.layout.metadata
    }

    /// The tensors in the order of the file.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.layout.tensors.iter().map(|(info, _)| info)
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors().find(|info| info.name == name)
    }

    /// The values of a tensor as f32, slowest axis first; `None` where the file has no such tensor.
    pub fn values(&self, name: &str) -> Option<Vec<f32>> {
        let (info, range) = self.layout.tensors.iter().find(|(info, _)| info.name == name)?;
        Some(info.kind.decode(&self.map[range.clone()]))
    }
}

impl Layout {
    pub(super) fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let mut cursor = Cursor { bytes, at: 0 };
        if cursor.take(4).ok() != Some(MAGIC.as_slice()) {
            return Err("not a GGUF file: it does not begin with \"GGUF\"".into());
        }
        match cursor.u32()? {
            VERSION => {}
            version if version.swap_bytes() == VERSION => {
                return Err("a big-endian GGUF file; only little-endian ones are read".into());
            }
            version => return Err(format!("GGUF version {version}; only version {VERSION} is read")),
        }
        let (tensor_count, key_count) = (cursor.u64()?, cursor.u64()?);
        // The least that a tensor (name, one dimension, type, offset) and a key (name, type, value) take.
        cursor.check_count("tensors", tensor_count, 8 + 4 + 8 + 4 + 8)?;
        cursor.check_count("keys", key_count, 8 + 4 + 1)?;
        let metadata = read_metadata(&mut cursor, key_count)?;
        let alignment = match metadata.get(ALIGNMENT_KEY) {
            None => ALIGNMENT,
            Some(Value::U32(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n as usize,
            Some(other) => return Err(format!("{ALIGNMENT_KEY} = {other:?} is not a power of two up to 2^20")),
        };
        let mut names = HashSet::new();
        let mut headers = Vec::new();
        for index in 0..tensor_count {
            let header = read_tensor(&mut cursor).map_err(|why| format!("tensor {index} of {tensor_count}: {why}"))?;
            if !names.insert(header.0.name.clone()) {
                return Err(format!("tensor {} stands twice", header.0.name));
            }
            headers.push(header);
        }
        let start = padded(cursor.at, alignment);
        check_padding(bytes, cursor.at..start)?;
        let mut end = start;
        let mut tensors = Vec::with_capacity(headers.len());
        for (info, size, offset) in headers {
            // As llama.cpp requires: one after the other, each at the next multiple of the alignment.
            if start.checked_add(offset) != Some(end) {
                return Err(format!("tensor {} lies at offset {offset}, expected {}", info.name, end - start));
            }
            let last = end.checked_add(size).filter(|last| *last <= bytes.len()).ok_or_else(|| {
                format!("cut short: tensor {} ends past the file's {} bytes; copy it again", info.name, bytes.len())
            })?;
            tensors.push((info, end..last));
            end = padded(last, alignment);
            check_padding(bytes, last..end)?;
        }
        if end != bytes.len() {
            let found = bytes.len();
            return Err(format!("the tensors end at byte {end}, but the file has {found} bytes; copy it again"));
        }
        Ok(Self { metadata, tensors })
    }
}

/// What fills a gap is zero, where the file has it at all: that it ends too early is said otherwise.
fn check_padding(bytes: &[u8], gap: std::ops::Range<usize>) -> std::result::Result<(), String> {
    match bytes.get(gap.clone()).into_iter().flatten().position(|byte| *byte != 0) {
        Some(at) => Err(format!("byte {} fills a gap and is not zero: the file is damaged", gap.start + at)),
        None => Ok(()),
    }
}

/// The next multiple of `alignment`, a power of two; saturates, which no file can reach.
pub(super) fn padded(at: usize, alignment: usize) -> usize {
    at.checked_next_multiple_of(alignment).unwrap_or(usize::MAX)
}

fn read_metadata(cursor: &mut Cursor, count: u64) -> std::result::Result<Metadata, String> {
    let mut names = HashSet::new();
    let mut pairs = Vec::new();
    for index in 0..count {
        let key = cursor.string().map_err(|why| format!("key {index} of {count}: {why}"))?;
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            return Err(format!("key {index} of {count} has a name of {} bytes", key.len()));
        }
        if !names.insert(key.clone()) {
            return Err(format!("the key {key} stands twice"));
        }
        let kind = cursor.u32()?;
        let value = read_value(cursor, kind).map_err(|why| format!("the key {key}: {why}"))?;
        pairs.push((key, value));
    }
    Ok(Metadata::from_distinct(pairs))
}

fn read_value(cursor: &mut Cursor, kind: u32) -> std::result::Result<Value, String> {
    Ok(match kind {
        code::U8 => Value::U8(u8::from_le_bytes(cursor.array()?)),
        code::I8 => Value::I8(i8::from_le_bytes(cursor.array()?)),
        code::U16 => Value::U16(u16::from_le_bytes(cursor.array()?)),
        code::I16 => Value::I16(i16::from_le_bytes(cursor.array()?)),
        code::U32 => Value::U32(cursor.u32()?),
        code::I32 => Value::I32(i32::from_le_bytes(cursor.array()?)),
        code::F32 => Value::F32(f32::from_le_bytes(cursor.array()?)),
        code::BOOL => Value::Bool(cursor.flag()?),
        code::STRING => Value::String(cursor.string()?),
        code::U64 => Value::U64(cursor.u64()?),
        code::I64 => Value::I64(i64::from_le_bytes(cursor.array()?)),
        code::F64 => Value::F64(f64::from_le_bytes(cursor.array()?)),
        code::ARRAY => {
            let kind = cursor.u32()?;
            let count = cursor.u64()?;
            Value::Array(read_array(cursor, kind, count)?)
        }
        other => return Err(format!("its type {other} is unknown")),
    })
}

fn read_array(cursor: &mut Cursor, kind: u32, count: u64) -> std::result::Result<Array, String> {
    macro_rules! scalars {
        ($kind:ident, $scalar:ty) => {
            Array::$kind(cursor.scalars::<{ size_of::<$scalar>() }>(count)?.map(<$scalar>::from_le_bytes).collect())
        };
    }
    Ok(match kind {
        code::U8 => scalars!(U8, u8),
        code::I8 => scalars!(I8, i8),
        code::U16 => scalars!(U16, u16),
        code::I16 => scalars!(I16, i16),
        code::U32 => scalars!(U32, u32),
        code::I32 => scalars!(I32, i32),
        code::F32 => scalars!(F32, f32),
        code::U64 => scalars!(U64, u64),
        code::I64 => scalars!(I64, i64),
        code::F64 => scalars!(F64, f64),
        code::BOOL => {
            cursor.check_count("elements", count, 1)?;
            Array::Bool((0..count).map(|_| cursor.flag()).collect::<std::result::Result<_, _>>()?)
        }
        code::STRING => {
            cursor.check_count("elements", count, 8)?;
            Array::String((0..count).map(|_| cursor.string()).collect::<std::result::Result<_, _>>()?)
        }
        code::ARRAY => return Err("an array of arrays is not read".into()),
        other => return Err(format!("its element type {other} is unknown")),
    })
}

/// A tensor's description, its size in bytes and its offset from the start of the data.
fn read_tensor(cursor: &mut Cursor) -> std::result::Result<(TensorInfo, usize, usize), String> {
    let name = cursor.string()?;
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(format!("a name of {} bytes; 1 to {MAX_NAME_BYTES} are allowed", name.len()));
    }
    let rank = cursor.u32()?;
    if !(1..=MAX_DIMS).contains(&rank) {
        return Err(format!("{name} has {rank} dimensions; 1 to {MAX_DIMS} are allowed"));
    }
    let dims = (0..rank).map(|_| cursor.u64()).collect::<std::result::Result<Vec<u64>, _>>()?;
    let kind = cursor.u32()?;
    let offset = cursor.u64()?;
    let kind = TensorType::from_code(kind)
        .ok_or_else(|| format!("{name} has the ggml type {kind}; only F32, F16, BF16 and Q8_0 are read"))?;
    let row = dims.first().copied().unwrap_or(1);
    let size = dims
        .iter()
        .try_fold(1u64, |product, dim| product.checked_mul(*dim))
        .filter(|elements| *elements > 0)
        .and_then(|elements| kind.bytes(elements, row))
        .and_then(|size| usize::try_from(size).ok())
        .ok_or_else(|| format!("{name} cannot have the dimensions {dims:?} in {kind}"))?;
    let shape = dims.iter().rev().map(|dim| usize::try_from(*dim)).collect::<std::result::Result<Vec<usize>, _>>();
    let (Ok(shape), Ok(offset)) = (shape, usize::try_from(offset)) else {
        return Err(format!("{name} is larger than this machine can address"));
    };
    Ok((TensorInfo { name, shape, kind }, size, offset))
}

/// A place in the file; every step is checked against its end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> std::result::Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..count).ok_or_else(|| {
            format!("cut short: {count} bytes are needed at byte {}, {} are left", self.at, rest.len())
        })?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> std::result::Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> std::result::Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> std::result::Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn flag(&mut self) -> std::result::Result<bool, String> {
        match self.array::<1>()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(format!("{other} is neither true nor false")),
        }
    }

    fn string(&mut self) -> std::result::Result<String, String> {
        let length = self.u64()?;
        self.check_count("bytes", length, 1)?;
        let bytes = self.take(length as usize)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| "a text that is not UTF-8".into())
    }

    /// `count` numbers of `N` bytes each.
    fn scalars<const N: usize>(
        &mut self,
        count: u64,
    ) -> std::result::Result<impl Iterator<Item = [u8; N]> + use<'a, N>, String> {
        self.check_count("elements", count, N as u64)?;
        let bytes = self.take(count as usize * N)?;
        Ok(bytes.chunks_exact(N).map(|chunk| {
            let mut out = [0; N];
            out.copy_from_slice(chunk);
            out
        }))
    }

    /// Refuses a count of things that take at least `each` bytes when the rest of the file is too short for them, before
    /// anything is allocated for them.
    fn check_count(&self, what: &str, count: u64, each: u64) -> std::result::Result<(), String> {
        let left = (self.bytes.len() - self.at) as u64;
        if count > left / each {
            return Err(format!(
                "it claims {count} {what}, but only {left} bytes are left; the file is cut short or damaged"
            ));
        }
        Ok(())
    }
}
