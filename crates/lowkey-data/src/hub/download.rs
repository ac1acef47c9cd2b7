//! The bytes of one file: resumed where an earlier attempt broke off, never more than announced, checked when whole.

use std::io::{Read, Write};
use std::path::Path;

use lowkey_files as files;
use sha1::{Digest, Sha1};
use ureq::http::Uri;
use ureq::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE};
use ureq::{Body, http::Response};

use super::cache::Cache;
use super::request::{Client, Described, Fault, header};

/// Fetches what is missing of a file and gives it its name. The caller holds the file's lock.
pub(super) fn fill(
    client: &Client<'_>,
    url: &Uri,
    described: &Described,
    cache: &Cache,
    largest_unannounced: u64,
) -> Result<(), Fault> {
    let partial = cache.partial(&described.etag);
    let disk = |e: files::Error| cache.disk(&e);
    let mut have = length(&partial);
    if described.size.is_some_and(|size| have > size) || !partial.is_file() {
        files::write::remove(&partial).map_err(disk)?;
        have = 0;
    }
    let resumed = have > 0;
    if described.size.is_none_or(|size| have < size) || !resumed {
        let response = client.get(url, have, described)?;
        let Some(part) = Part::read(&response, have)? else {
            files::write::remove(&partial).map_err(disk)?;
            return Err(Fault::Passing("the server does not go on where it broke off".to_owned(), None));
        };
        let total = match (described.size, part.total) {
            (Some(size), Some(total)) if size != total => {
                return Err(Fault::Final(format!("the server sends {total} bytes of a file that has {size}")));
            }
            (size, total) => size.or(total),
        };
        if let (Some(total), Some(room)) = (total, files::room(partial.parent().unwrap_or(&partial)))
            && total.saturating_sub(part.start) > room
        {
            let missing = total - part.start;
            return Err(cache.disk(&format!("{missing} bytes are still to come, and the disk takes {room}")));
        }
        if part.start == 0 {
            files::write::remove(&partial).map_err(disk)?;
        }
        receive(client, response, &partial, part.start, total, largest_unannounced, cache)?;
    }
    if let Some(message) = wrong(&partial, &described.etag).map_err(disk)? {
        files::write::remove(&partial).map_err(disk)?;
        // What lay here from an earlier attempt may be at fault.
        return Err(if resumed { Fault::Passing(message, None) } else { Fault::Final(message) });
    }
    files::write::rename(&partial, &cache.blob(&described.etag)).map_err(disk)
}

/// Length of a regular file; 0 for anything else.
pub(super) fn length(path: &Path) -> u64 {
    path.symlink_metadata().ok().filter(std::fs::Metadata::is_file).map_or(0, |found| found.len())
}

/// Which part of the file an answer holds.
struct Part {
    start: u64,
    /// Bytes of the whole file, where the answer says so.
    total: Option<u64>,
}

impl Part {
    /// None where the answer does not go on from byte `have`, nor begins again.
    fn read(response: &Response<Body>, have: u64) -> Result<Option<Self>, Fault> {
        if let Some(encoding) = header(response, CONTENT_ENCODING.as_str())
            && !encoding.trim().eq_ignore_ascii_case("identity")
        {
            return Err(Fault::Final(format!(
                "the server sends the file in the encoding {encoding:?}, which was not asked for; is a proxy between that changes files?"
            )));
        }
        let number = |text: &str| text.trim().parse::<u64>().ok();
        Ok(match response.status().as_u16() {
            200 => Some(Self {
                start: 0,
                total: header(response, CONTENT_LENGTH.as_str()).and_then(|length| number(&length)),
            }),
            206 => header(response, CONTENT_RANGE.as_str()).and_then(|range| {
                let (part, total) = range.trim().strip_prefix("bytes ")?.split_once('/')?;
                let start = number(part.split('-').next()?)?;
                (start == have).then(|| Self { start, total: number(total) })
            }),
            _ => None,
        })
    }
}

/// Appends a body to the partial file, of which `have` bytes are there.
fn receive(
    client: &Client<'_>,
    response: Response<Body>,
    partial: &Path,
    mut have: u64,
    total: Option<u64>,
    largest_unannounced: u64,
    cache: &Cache,
) -> Result<(), Fault> {
    let mut file = files::write::append(partial).map_err(|e| cache.disk(&e))?;
    let mut body = response.into_body().into_reader();
    let mut buffer = vec![0; 1 << 17];
    loop {
        let arrived = match body.read(&mut buffer) {
            Ok(0) => break,
            Ok(arrived) => arrived,
            Err(e) => {
                let of = total.map_or(String::new(), |total| format!(" of {total}"));
                return Err(client.broken(&format!("the transfer broke off after {have}{of} bytes"), e));
            }
        };
        have += arrived as u64;
        if have > total.unwrap_or(largest_unannounced) {
            files::write::remove(partial).map_err(|e| cache.disk(&e))?;
            return Err(Fault::Final(match total {
                Some(total) => format!("the server sends more than the {total} bytes that the file has"),
                None => format!(
                    "the server does not say how long the file is, and sends more than {largest_unannounced} bytes"
                ),
            }));
        }
        file.write_all(&buffer[..arrived]).map_err(|e| cache.disk(&e))?;
    }
    file.sync_all().map_err(|e| cache.disk(&e))?;
    match total {
        Some(total) if have < total => {
            Err(Fault::Passing(format!("the transfer ended after {have} of {total} bytes"), None))
        }
        _ => Ok(()),
    }
}

/// What is wrong with a file by the name of its content. The hub names large files by their SHA-256 and small ones by
/// their git hash; mirrors put other things in their place, among them the plain SHA-1, and some of those say nothing.
fn wrong(path: &Path, etag: &str) -> files::Result<Option<String>> {
    if !etag.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(None);
    }
    let expected = etag.to_ascii_lowercase();
    let differs = |kind: &str, found: &str| {
        Some(format!("what arrived is not the file: its {kind} is {found}, but the hub names {expected}; try again"))
    };
    Ok(match etag.len() {
        64 => Some(files::hash::sha256(path)?).filter(|found| *found != expected).and_then(|f| differs("SHA-256", &f)),
        40 => {
            let git = sha1(Sha1::new_with_prefix(format!("blob {}\0", length(path))), path)?;
            if git == expected || sha1(Sha1::new(), path)? == expected { None } else { differs("git hash", &git) }
        }
        _ => None,
    })
}

fn sha1(mut digest: Sha1, path: &Path) -> files::Result<String> {
    let mut file = files::open(path)?;
    let mut buffer = vec![0; 1 << 17];
    loop {
        let read =
            file.read(&mut buffer).map_err(|why| files::Error::Io { doing: "read", path: path.to_path_buf(), why })?;
        if read == 0 {
            return Ok(files::hash::hex(&digest.finalize()));
        }
        digest.update(&buffer[..read]);
    }
}
