use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

/// A block with what was written to it.
struct Block {
    at: *mut u8,
    layout: Layout,
    fill: u8,
}

impl Block {
    fn bytes(&self) -> &[u8] {
        // SAFETY: it was allocated with this size, and all of it is written to.
        unsafe { std::slice::from_raw_parts(self.at, self.layout.size()) }
    }

    fn write(&self) {
        // SAFETY: as above.
        unsafe { self.at.write_bytes(self.fill, self.layout.size()) };
    }
}

/// A size on either side of [`LARGE`], up to some MiB, most of them small.
fn size(random: &mut ChaCha8Rng) -> usize {
    let log = random.random_range(4..23);
    random.random_range(1..=1usize << log)
}

/// Takes, frees and resizes blocks, and looks whether each still holds what was written to it, and zeros where they were asked for.
fn use_it(allocator: &Allocator, seed: u64, rounds: usize) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut blocks: Vec<Block> = Vec::new();
    for round in 0..rounds {
        let fill = (round % 255 + 1) as u8;
        match random.random_range(0..5) {
            0 | 1 => {
                let align = 1 << random.random_range(0..13);
                let layout = Layout::from_size_align(size(&mut random), align).unwrap();
                let zeroed = random.random_bool(0.5);
                // SAFETY: the size is not zero.
                let at = unsafe { if zeroed { allocator.alloc_zeroed(layout) } else { allocator.alloc(layout) } };
                assert!(!at.is_null() && at.addr().is_multiple_of(align));
                let block = Block { at, layout, fill };
                if zeroed {
                    assert!(block.bytes().iter().all(|byte| *byte == 0), "{layout:?}");
                }
                block.write();
                blocks.push(block);
            }
            2 if !blocks.is_empty() => {
                let old = blocks.swap_remove(random.random_range(0..blocks.len()));
                let new_size = size(&mut random);
                // SAFETY: it was taken with this layout, and the new size is not zero.
                let at = unsafe { allocator.realloc(old.at, old.layout, new_size) };
                let layout = Layout::from_size_align(new_size, old.layout.align()).unwrap();
                assert!(!at.is_null() && at.addr().is_multiple_of(layout.align()));
                // SAFETY: both sizes reach that far.
                let same = unsafe { std::slice::from_raw_parts(at, new_size.min(old.layout.size())) };
                assert!(same.iter().all(|byte| *byte == old.fill));
                let block = Block { at, layout, fill };
                block.write();
                blocks.push(block);
            }
            _ if !blocks.is_empty() => {
                let block = blocks.swap_remove(random.random_range(0..blocks.len()));
                assert!(block.bytes().iter().all(|byte| *byte == block.fill), "{:?}", block.layout);
                // SAFETY: it was taken with this layout.
                unsafe { allocator.dealloc(block.at, block.layout) };
            }
            _ => {}
        }
    }
    for block in blocks {
        assert!(block.bytes().iter().all(|byte| *byte == block.fill));
        // SAFETY: as above.
        unsafe { allocator.dealloc(block.at, block.layout) };
    }
}

#[test]
fn blocks_of_all_sizes_keep_what_is_written_to_them_on_several_threads() {
    static ALLOCATOR: Allocator = Allocator::new();
    std::thread::scope(|scope| {
        (0..4).for_each(|seed| _ = scope.spawn(move || use_it(&ALLOCATOR, seed, 3000)));
    });
}

#[test]
fn what_was_freed_serves_blocks_of_other_sizes_and_threads() {
    const MIB: usize = 1 << 20;
    let allocator = Allocator::new();
    for blocks in [vec![6 * MIB; 40], vec![30 * MIB; 8], vec![MIB / 2; 480], vec![2 * MIB + 5; 119], vec![238 * MIB]] {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let layouts = blocks.iter().map(|size| Layout::from_size_align(*size, 16).unwrap());
                // SAFETY: sizes are not zero, and each block is freed with the layout that it was taken with.
                let taken: Vec<_> = layouts.map(|layout| (unsafe { allocator.alloc(layout) }, layout)).collect();
                taken.into_iter().for_each(|(block, layout)| unsafe { allocator.dealloc(block, layout) });
            });
        });
        let Span { base, unwritten, .. } = allocator.large().source.spans[0];
        let highest = unwritten - base;
        assert!(highest <= 256 * MIB, "{highest} with {} blocks of {}", blocks.len(), blocks[0]);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn zeros_that_nobody_writes_to_take_no_memory() {
    const SIZE: usize = 1 << 30;
    let resident = || -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        4096 * statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap()
    };
    let (allocator, before) = (Allocator::new(), resident());
    let layout = Layout::from_size_align(SIZE, 16).unwrap();
    // SAFETY: the size is not zero; the block is freed with its layout.
    let block = unsafe { allocator.alloc_zeroed(layout) };
    assert!(!block.is_null());
    let more = resident().saturating_sub(before);
    assert!(more < SIZE / 2, "{more} bytes are there");
    // SAFETY: it is written to where it lies, and read in the block that takes its place.
    unsafe {
        block.add(SIZE / 2).write(7);
        allocator.dealloc(block, layout);
        let again = allocator.alloc_zeroed(layout);
        assert_eq!((again, again.add(SIZE / 2).read()), (block, 0), "the same place, cleared");
        allocator.dealloc(again, layout);
    }
}

#[test]
fn a_size_is_that_of_its_bins_smallest_block_and_little_more_than_was_asked_for() {
    let mut last = 0;
    for size in (LARGE..1 << 20).step_by(97).chain((0..2000).map(|i| (1 << 20) + i * 9_999_991)) {
        let layout = rounded(Layout::from_size_align(size, 8).unwrap());
        assert!(layout.size() >= size && layout.size() - size <= 16 + size / 64, "{size}: {layout:?}");
        // What the heap makes of it: a word more, in units of four.
        let chunk = (layout.size() + 8).next_multiple_of(32);
        assert_eq!(Bins::size_to_bin(chunk), Bins::size_to_bin_ceil(chunk), "{size}");
        assert!(Bins::size_to_bin(chunk) >= last && Bins::size_to_bin(chunk) == Bins::size_to_bin(chunk - 1) + 1);
        last = Bins::size_to_bin(chunk);
    }
}
