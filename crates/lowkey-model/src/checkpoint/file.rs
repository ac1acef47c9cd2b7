//! One safetensors file, written tensor by tensor: no two of them need to be in memory as bytes.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use lowkey_files::NewFile;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::error::{Error, Result};

/// A tensor whose bytes are made when it is written.
pub struct Pending<'a> {
    pub(super) name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Box<dyn FnOnce() -> Result<Vec<u8>> + 'a>,
}

impl<'a> Pending<'a> {
    /// A tensor of which `bytes` are the numbers, in order, little-endian.
    pub fn new(name: String, dtype: Dtype, shape: Vec<usize>, bytes: impl FnOnce() -> Result<Vec<u8>> + 'a) -> Self {
        Self { name, dtype, shape, bytes: Box::new(bytes) }
    }

    /// How many bytes it takes in a file.
    pub(super) fn len(&self) -> usize {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize()).div_ceil(8)
    }
}

/// Writes a file with these tensors: whole, or not at all.
///
/// # Errors
/// What making the bytes of a tensor ends with; [`Error::Io`] where the file cannot be written; [`Error::File`] for tensors that no such
/// file can have.
pub fn write_tensors(path: &Path, tensors: Vec<Pending>, metadata: Option<HashMap<String, String>>) -> Result<()> {
    let mut file = NewFile::create(path)?;
    write_into(&mut file, path, tensors, metadata)?;
    Ok(file.commit()?)
}

/// Writes the content of the file that is to be at `path`.
pub(super) fn write_into(
    out: &mut impl Write,
    path: &Path,
    mut tensors: Vec<Pending>,
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    let cannot = |why: String| Error::file(path, format!("cannot be encoded: {why}"));
    // As the safetensors crate lays them out: the widest numbers first, so that all are aligned, and by name.
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut end = 0;
    let info = |tensor: &Pending| {
        let begin = end;
        end += tensor.len();
        let info = TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (begin, end) };
        (tensor.name.clone(), info)
    };
    let header = Metadata::new(metadata, tensors.iter().map(info).collect()).map_err(|e| cannot(e.to_string()))?;
    let mut header = serde_json::to_vec(&header).map_err(|e| cannot(e.to_string()))?;
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    let mut write = |bytes: &[u8]| out.write_all(bytes).map_err(|e| Error::io(path, e));
    write(&(header.len() as u64).to_le_bytes())?;
    write(&header)?;
    for tensor in tensors {
        let (length, name) = (tensor.len(), tensor.name);
        let bytes = (tensor.bytes)()?;
        if bytes.len() != length {
            return Err(cannot(format!("tensor {name} has {} bytes, and its shape {length}", bytes.len())));
        }
        write(&bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    #[test]
    fn the_file_is_the_one_that_the_safetensors_crate_writes() {
        let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
        let all = [
            ("b", Dtype::F32, vec![2, 3], 24),
            ("a", Dtype::F32, vec![1], 4),
            ("wide", Dtype::F64, vec![1, 1], 8),
            ("bytes", Dtype::U8, vec![5], 5),
            ("none", Dtype::F32, vec![0, 4], 0),
            ("half", Dtype::BF16, vec![3], 6),
        ];
        let bytes = |length: usize| (0..length).map(|i| i as u8 + 1).collect::<Vec<u8>>();
        let held: Vec<_> = all.iter().map(|(.., length)| bytes(*length)).collect();
        let views = all
            .iter()
            .zip(&held)
            .map(|((name, dtype, shape, _), bytes)| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        let expected = safetensors::serialize(views, metadata.clone()).unwrap();
        let pending = all.iter().map(|(name, dtype, shape, length)| {
            Pending::new((*name).to_owned(), *dtype, shape.clone(), || Ok(bytes(*length)))
        });
        let mut found = Vec::new();
        write_into(&mut found, Path::new("here"), pending.collect(), metadata).unwrap();
        assert!(found == expected);
    }

    #[test]
    fn bytes_that_are_not_those_of_the_shape_leave_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let short = Pending::new("w".into(), Dtype::F32, vec![2], || Ok(vec![0; 7]));
        let error = write_tensors(&path, vec![short], None).unwrap_err().to_string();
        assert!(error.contains("a.safetensors") && error.contains("tensor w has 7 bytes, and its shape 8"), "{error}");
        let failing = Pending::new("w".into(), Dtype::F32, vec![2], || Err(Error::file(Path::new("w"), "is gone")));
        assert!(write_tensors(&path, vec![failing], None).unwrap_err().to_string().contains("is gone"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
