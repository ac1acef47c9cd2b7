//! How much a disk still takes.

use std::path::Path;

/// Bytes that may still be written below `dir`, or none where the system does not say. Asking before a long write is
/// kinder than filling the disk.
#[cfg(unix)]
pub fn room(dir: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(dir.as_os_str().as_bytes()).ok()?;
    let mut found = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the name is a C string, and the place is one for this structure.
    if unsafe { libc::statvfs(name.as_ptr(), found.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: the call has succeeded and filled it.
    let found = unsafe { found.assume_init() };
    // The widths of these fields differ between systems.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast, reason = "not on each system")]
    (found.f_bavail as u64).checked_mul(found.f_frsize as u64)
}

/// Elsewhere the write itself finds out.
#[cfg(not(unix))]
pub fn room(_: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_disk_says_what_it_still_takes() {
        assert!(room(&std::env::temp_dir()).unwrap() > 0);
        assert_eq!(room(Path::new("/no/such/folder")), None);
    }
}
