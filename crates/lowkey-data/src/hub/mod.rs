//! Files of dataset repositories on the Hugging Face hub, or on a mirror that speaks its protocol.
//!
//! The server is not trusted: no name that it gives becomes a path unchecked (`names`), the token is shown to nobody but
//! the endpoint (`request`), and a file counts only when its length and hash are those announced (`download`). It lies
//! in the cache (`cache`) that all Hugging Face tools share.

mod cache;
mod download;
mod names;
mod request;

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use lowkey_files as files;

use crate::error::{Error, Result};
use cache::Cache;
pub(crate) use names::{check_file, check_repo, check_revision};
use request::{Client, Fault};

/// A token has some forty characters.
const LONGEST_TOKEN: u64 = 4096;
/// An attempt that brings this much is progress, and attempts are counted anew.
const PROGRESS: u64 = 1 << 20;

/// Where the hub is, who asks, and where its files are kept.
#[derive(Clone)]
pub struct HubConfig {
    /// The server, as `https://huggingface.co`.
    pub endpoint: String,
    /// An access token, needed for private and gated repositories. Only the endpoint gets to see it.
    pub token: Option<String>,
    /// The cache, in the layout that all Hugging Face tools share.
    pub cache: PathBuf,
    /// Whether nothing but the cache is asked.
    pub offline: bool,
    /// How long to wait, and how often.
    pub patience: Patience,
}

/// How long a server may take, and how often it is asked again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For a connection.
    pub connect: Duration,
    /// For the beginning of an answer.
    pub answer: Duration,
    /// Without a single byte, in the middle of an answer. A slow transfer is none that stalls.
    pub stall: Duration,
    /// For another process that is fetching the same file, while what it has fetched does not grow.
    pub lock: Duration,
    /// Further attempts after one that failed for a reason that may pass.
    pub retries: u32,
    /// Before the first further attempt; doubled for each one.
    pub pause: Duration,
    /// The longest pause that a server may ask for.
    pub longest_pause: Duration,
    /// The largest file in bytes that a server may send without saying how large it is.
    pub largest_unannounced: u64,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            answer: Duration::from_secs(30),
            stall: Duration::from_secs(60),
            lock: Duration::from_secs(90),
            retries: 3,
            pause: Duration::from_millis(500),
            longest_pause: Duration::from_secs(60),
            largest_unannounced: 1 << 30,
        }
    }
}

impl HubConfig {
    /// As the Hugging Face tools do it:
    ///
    /// - `HF_ENDPOINT` names the server;
    /// - `HF_TOKEN` is the token, else the file that `HF_TOKEN_PATH` names, else `token` under `HF_HOME`;
    /// - `HF_HUB_CACHE` is the cache, else `hub` under `HF_HOME`, which is `huggingface` under `XDG_CACHE_HOME` or
    ///   `~/.cache` unless set;
    /// - `HF_HUB_OFFLINE` (1, on, yes or true) asks the cache alone;
    /// - `HF_HUB_ETAG_TIMEOUT` and `HF_HUB_DOWNLOAD_TIMEOUT` are seconds to wait for an answer, and for the next bytes of a
    ///   file.
    pub fn from_env() -> Self {
        Self::from_variables(|name| env::var_os(name))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let path = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let text = |name: &str| {
            let value = variable(name)?.into_string().ok()?;
            Some(value.trim().to_owned()).filter(|value| !value.is_empty())
        };
        let home = path("HF_HOME").unwrap_or_else(|| {
            // Without a home folder the cache lies in the working folder, where it is at least seen.
            let caches = || env::home_dir().unwrap_or_default().join(".cache");
            path("XDG_CACHE_HOME").unwrap_or_else(caches).join("huggingface")
        });
        let saved = || {
            let file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
            files::read_text(&file, LONGEST_TOKEN).ok()
        };
        let token = text("HF_TOKEN").or_else(saved).map(|token| token.trim().to_owned());
        let set = |name: &str| {
            text(name).is_some_and(|value| matches!(value.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true"))
        };
        let seconds = |name: &str| text(name)?.parse().ok().filter(|&seconds| seconds > 0).map(Duration::from_secs);
        let mut patience = Patience::default();
        if let Some(answer) = seconds("HF_HUB_ETAG_TIMEOUT") {
            (patience.connect, patience.answer) = (answer, answer);
        }
        patience.stall = seconds("HF_HUB_DOWNLOAD_TIMEOUT").unwrap_or(patience.stall);
        Self {
            endpoint: text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned()),
            token: token.filter(|token| !token.is_empty()),
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            offline: set("HF_HUB_OFFLINE"),
            patience,
        }
    }

    /// The local copy of one file of a dataset repository, fetched unless the cache has it.
    pub(crate) fn fetch(&self, repo: &str, revision: &str, file: &str) -> Result<PathBuf> {
        self.find_or_fetch(repo, revision, file).map_err(|fault| {
            let (Fault::Final(message) | Fault::Passing(message, _)) = fault;
            let shown = |text: &str| files::printable(text).into_owned();
            Error::Hub {
                repo: shown(repo),
                file: shown(file),
                revision: shown(revision),
                // A mistake may have put a password there.
                endpoint: shown(self.endpoint.rsplit('@').next().unwrap_or_default()),
                message,
            }
        })
    }

    fn find_or_fetch(&self, repo: &str, revision: &str, file: &str) -> std::result::Result<PathBuf, Fault> {
        let refuse = |what: &'static str| move |why: String| Fault::Final(format!("{what} {why}"));
        check_repo(repo).map_err(refuse("the repository"))?;
        check_revision(revision).map_err(refuse("the revision"))?;
        check_file(file).map_err(refuse("the file"))?;
        // The cache links its entries to each other and needs to know where it is.
        let root = std::path::absolute(&self.cache).map_err(|e| Fault::Final(format!("no cache: {e}")))?;
        let cache = Cache::new(root, repo);
        if let Some(path) = cache.find(revision, file) {
            return Ok(path);
        }
        if self.offline {
            let cache = self.cache.to_string_lossy();
            return Err(Fault::Final(format!(
                "it is not in the cache {}, and HF_HUB_OFFLINE forbids to ask the hub; unset it, or fetch the file first",
                files::printable(&cache)
            )));
        }
        let client = Client::new(&self.endpoint, self.token.as_deref(), &self.patience)?;
        let url = client.url(repo, revision, file)?;
        let (mut left, mut pause) = (self.patience.retries, self.patience.pause);
        loop {
            let mut arrived = 0;
            let fault = match self.attempt(&client, &url, &cache, (revision, file), &mut arrived) {
                Ok(path) => return Ok(path),
                Err(fault) => fault,
            };
            if arrived >= PROGRESS {
                (left, pause) = (self.patience.retries, self.patience.pause);
            }
            match fault {
                Fault::Passing(_, asked) if left > 0 => {
                    std::thread::sleep(asked.map_or(pause, |asked| asked.min(self.patience.longest_pause)));
                    left -= 1;
                    pause = (pause * 2).min(self.patience.longest_pause);
                }
                fault => return Err(fault),
            }
        }
    }

    /// One attempt; `arrived` tells how many bytes it brought.
    fn attempt(
        &self,
        client: &Client<'_>,
        url: &ureq::http::Uri,
        cache: &Cache,
        (revision, file): (&str, &str),
        arrived: &mut u64,
    ) -> std::result::Result<PathBuf, Fault> {
        let described = client.describe(url)?;
        let lock = cache.lock(&described.etag, self.patience.lock)?;
        let there = cache.blob(&described.etag).metadata();
        let whole = |found: &std::fs::Metadata| described.size.is_none_or(|size| size == found.len());
        if !there.is_ok_and(|found| found.is_file() && whole(&found)) {
            let partial = cache.partial(&described.etag);
            let before = download::length(&partial);
            let filled = download::fill(client, url, &described, cache, self.patience.largest_unannounced);
            *arrived = download::length(&partial).saturating_sub(before);
            filled?;
        }
        let path = cache.point(&described, revision, file);
        drop(lock);
        path
    }
}

impl std::fmt::Debug for HubConfig {
    /// The token is a secret and is not shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubConfig")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "hidden"))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .field("patience", &self.patience)
            .finish()
    }
}

#[cfg(test)]
pub(crate) mod tests;
