//! Which names may become parts of paths.
//!
//! Repository, revision and file come from a dataset file, the hash of a file and the commit from a server: each is
//! looked at before anything is asked for or created.

use lowkey_files::is_plain_name;

/// Hashes are 64 characters at most. A name must leave room for a suffix within the 255 bytes of a file name.
const LONGEST_TAG: usize = 128;

/// `owner/name`, or the name alone of a repository that the hub itself keeps.
pub(crate) fn check_repo(repo: &str) -> Result<(), String> {
    let plain = |part: &str| is_tag(part) && !part.contains("--");
    if repo.split('/').count() <= 2 && repo.split('/').all(plain) {
        return Ok(());
    }
    Err(format!("{repo:?} is not of the form owner/name, in letters, digits, '-', '_' and '.'"))
}

/// A branch, a tag or a commit. Branches may hold slashes.
pub(crate) fn check_revision(revision: &str) -> Result<(), String> {
    if revision.split('/').all(is_plain_name) {
        return Ok(());
    }
    Err(format!(
        "{revision:?} is not the name of a branch, a tag or a commit; it may hold no empty part, no '.' or '..' between slashes, and no '\\'"
    ))
}

/// A path inside a repository.
pub(crate) fn check_file(file: &str) -> Result<(), String> {
    if file.split('/').all(is_plain_name) {
        return Ok(());
    }
    Err(format!("{file:?} is not a path inside the repository"))
}

/// What may stand for a file's content or a commit: a file of this name lies in the cache.
pub(super) fn is_tag(tag: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    !tag.is_empty()
        && tag.len() <= LONGEST_TAG
        && tag.bytes().all(plain)
        && !tag.starts_with('.')
        && !tag.ends_with(".incomplete")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_leads_elsewhere_is_refused() {
        for good in ["main", "v1.0", "refs/pr/3", "refs/convert/parquet", "feature/a b", "0a1b2c"] {
            check_revision(good).unwrap();
        }
        for bad in ["", "/", "/etc/passwd", "a//b", "a/", ".", "..", "a/../b", "../../x", "a\\b", "a\nb", "\u{1b}[2J"] {
            let message = check_revision(bad).unwrap_err();
            assert!(!message.contains(['\n', '\u{1b}']), "{message}");
            check_file(bad).unwrap_err();
            check_repo(bad).unwrap_err();
        }
        check_file("data/train 1.jsonl").unwrap();
        check_repo("owner/name").unwrap();
        check_repo("name").unwrap();
        for bad in ["a/b/c", "a--b", "a b", "a/.b", "a/b?x"] {
            check_repo(bad).unwrap_err();
        }
        assert!(is_tag("0a1b") && is_tag("A_b-c.d"));
        for bad in ["", ".", "..", "../x", "a/b", "a\\b", "a b", "a\u{e9}", "x.incomplete", &"a".repeat(129)] {
            assert!(!is_tag(bad), "{bad}");
        }
    }
}
