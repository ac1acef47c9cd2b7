//! What of this processor multiplies bf16.

use std::sync::OnceLock;

/// What products in bf16 are computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Tiles of 16 × 16 sums (Intel's AMX): some ten times the arithmetic of f32.
    Tiles,
    /// Pairs of products in vectors (AVX512-BF16).
    Pairs,
    /// Neither: rounded operands, multiplied in f32. As exact, and slower than f32.
    Emulated,
}

impl Unit {
    /// The fastest that the processor and its system have.
    pub(crate) fn here() -> Self {
        Self::all().next().unwrap_or(Self::Emulated)
    }

    /// What the processor's maker calls it.
    pub(crate) fn name(self) -> Option<&'static str> {
        match self {
            Self::Tiles => Some("AMX"),
            Self::Pairs => Some("AVX512-BF16"),
            Self::Emulated => None,
        }
    }

    /// All that there are here, the fastest first.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        [Self::Tiles, Self::Pairs, Self::Emulated].into_iter().filter(|unit| unit.is_here())
    }

    /// Whether it is one of these.
    pub(super) fn is_here(self) -> bool {
        // Asking a virtual processor takes longer than a small product.
        static HERE: OnceLock<[bool; 2]> = OnceLock::new();
        let [tiles, pairs] = *HERE.get_or_init(x86::units);
        match self {
            Self::Tiles => tiles,
            Self::Pairs => pairs,
            Self::Emulated => true,
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::__cpuid_count;

    /// Whether there are tiles, and vectors of pairs. Operands are packed with the latter's conversions in both cases.
    pub(super) fn units() -> [bool; 2] {
        let pairs = std::arch::is_x86_feature_detected!("avx512bf16")
            && std::arch::is_x86_feature_detected!("avx512bw")
            && std::arch::is_x86_feature_detected!("avx512vl");
        let features = __cpuid_count(7, 0).edx;
        let [of_bf16, of_tiles] = [22, 24].map(|bit| features >> bit & 1 == 1);
        [pairs && of_bf16 && of_tiles && may_use_tiles(), pairs]
    }

    /// Asks the system for the 8 KiB of state that a thread with tiles has. It is granted to all threads of this process.
    #[cfg(target_os = "linux")]
    fn may_use_tiles() -> bool {
        use std::arch::asm;
        const ARCH_PRCTL: i64 = 158;
        const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
        const XFEATURE_XTILEDATA: i64 = 18;
        let answer: i64;
        // SAFETY: a system call that reads its two arguments and no memory; the kernel changes `rax`, `rcx` and `r11` alone.
        unsafe {
            asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => answer,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA,
                out("rcx") _,
                out("r11") _,
                options(nostack),
            );
        }
        answer == 0
    }

    #[cfg(not(target_os = "linux"))]
    fn may_use_tiles() -> bool {
        false
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod x86 {
    pub(super) fn units() -> [bool; 2] {
        [false; 2]
    }
}
