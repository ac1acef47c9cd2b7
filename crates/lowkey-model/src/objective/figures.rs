//! What a term tells of a step beside its loss.
//!
//! A term gives its figures where its loss is computed, by name, each as a sum over what the loss is a sum over: targets, or pairs. They
//! pass whole from there through everything that adds up (passes, threads, members, the queue of a device) to the line of the step,
//! where they are means. Nothing on the way knows one of them by name.

use std::collections::BTreeMap;

use burn::tensor::{Device, FloatDType, Tensor};

/// Sums by name, in the order in which they were given. Of two terms that give the same name the sums are added up.
#[derive(Clone, Debug, Default)]
pub struct Figures(Vec<(&'static str, Figure)>);

#[derive(Clone, Debug)]
enum Figure {
    /// A sum that the host knows.
    Host(f64),
    /// One that a device has, or will have: a number `[1]` for each pass.
    Device(Vec<Tensor<1>>),
    /// How far one figure of the host lies above another: the difference of what is told of these two.
    Above([&'static str; 2]),
}

impl Figures {
    /// With a sum that the host knows.
    #[must_use]
    pub fn with(mut self, name: &'static str, sum: f64) -> Self {
        self.0.push((name, Figure::Host(sum)));
        self
    }

    /// With a sum `[1]` that lies where the model does; nobody waits for it before the step's loss is waited for.
    #[must_use]
    pub fn with_tensor(mut self, name: &'static str, sum: Tensor<1>) -> Self {
        let sum = if sum.is_autodiff() { sum.without_autodiff() } else { sum };
        self.0.push((name, Figure::Device(vec![sum.cast(FloatDType::F32)])));
        self
    }

    /// With the difference of two figures of the host: the first less the second.
    #[must_use]
    pub fn with_difference(mut self, name: &'static str, of: [&'static str; 2]) -> Self {
        self.0.push((name, Figure::Above(of)));
        self
    }

    /// Adds those of another part of the step.
    pub fn add(&mut self, more: Self) {
        for (name, more) in more.0 {
            let Some((_, figure)) = self.0.iter_mut().find(|(own, _)| *own == name) else {
                self.0.push((name, more));
                continue;
            };
            match (figure, more) {
                (Figure::Host(sum), Figure::Host(more)) => *sum += more,
                (Figure::Device(sums), Figure::Device(more)) => sums.extend(more),
                // The difference of the sums is formed of them; and a name stands for one kind of figure.
                (Figure::Above(_), _) | (Figure::Host(_), _) | (Figure::Device(_), _) => {}
            }
        }
    }

    /// The sums that a device has, `[1]` each, in their order: what is added up among devices and read back beside the loss.
    pub fn on_device(&self) -> Vec<Tensor<1>> {
        let sums = self.0.iter().filter_map(|(_, figure)| match figure {
            Figure::Device(sums) => Some(match &sums[..] {
                [only] => only.clone(),
                // Along the axis: the sum over all would be one of atomic additions on a GPU, in an order that changes.
                several => Tensor::cat(several.to_vec(), 0).sum_dim(0),
            }),
            Figure::Host(_) | Figure::Above(_) => None,
        });
        sums.collect()
    }

    /// The same with these sums in the place of [`Figures::on_device`].
    #[must_use]
    pub fn with_sums(mut self, sums: impl IntoIterator<Item = Tensor<1>>) -> Self {
        let own = self.0.iter_mut().filter_map(|(_, figure)| match figure {
            Figure::Device(own) => Some(own),
            Figure::Host(_) | Figure::Above(_) => None,
        });
        own.zip(sums).for_each(|(own, sum)| *own = vec![sum]);
        self
    }

    /// All numbers, figure by figure, as another process is told them: a sum of the host, of a device one for each pass. Waits for the
    /// device.
    ///
    /// # Errors
    /// What the device says where a number cannot be read.
    pub fn numbers(&self) -> Result<Vec<Vec<f64>>, String> {
        let read = |sum: &Tensor<1>| {
            let number = sum.clone().try_into_scalar::<f32>();
            number.map(f64::from).map_err(|e| format!("{e:?}"))
        };
        let numbers = |(_, figure): &(_, Figure)| match figure {
            Figure::Host(sum) => Ok(vec![*sum]),
            Figure::Device(sums) => sums.iter().map(read).collect(),
            Figure::Above(_) => Ok(Vec::new()),
        };
        self.0.iter().map(numbers).collect()
    }

    /// These figures as another process has them, by its [`Figures::numbers`]; none where it has others.
    pub fn with_numbers(&self, numbers: &[Vec<f64>], device: &Device) -> Option<Self> {
        let told = |((name, figure), numbers): (&(&'static str, Figure), &Vec<f64>)| {
            let figure = match (figure, &numbers[..]) {
                (Figure::Host(_), [sum]) => Figure::Host(*sum),
                (Figure::Device(_), sums) => {
                    Figure::Device(sums.iter().map(|sum| Tensor::from_floats([*sum as f32], device)).collect())
                }
                (Figure::Above(of), []) => Figure::Above(*of),
                (Figure::Host(_) | Figure::Above(_), _) => return None,
            };
            Some((*name, figure))
        };
        if self.0.len() != numbers.len() {
            return None;
        }
        self.0.iter().zip(numbers).map(told).collect::<Option<_>>().map(Self)
    }

    /// The means over `count` targets or pairs; `read` are the numbers of [`Figures::on_device`].
    pub fn means(&self, read: &[f32], count: usize) -> BTreeMap<String, f64> {
        let (mut read, count) = (read.iter(), count.max(1) as f64);
        let host = |name: &str| {
            let sum = self.0.iter().find_map(|(own, figure)| match figure {
                Figure::Host(sum) if *own == name => Some(*sum),
                _ => None,
            });
            sum.unwrap_or_default()
        };
        let mean = |(name, figure): &(&'static str, Figure)| {
            let sum = match figure {
                Figure::Host(sum) => *sum,
                Figure::Device(_) => f64::from(*read.next()?),
                Figure::Above([one, other]) => host(one) - host(other),
            };
            Some(((*name).to_owned(), sum / count))
        };
        self.0.iter().filter_map(mean).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::values;

    #[test]
    fn sums_of_parts_are_added_and_become_means() {
        let tensor = |x: f32| Tensor::<1>::from_floats([x], &Device::flex().autodiff()).require_grad();
        let part = |x: f64| {
            let host = Figures::default().with("a", x).with("b", 0.1 * x).with_difference("apart", ["a", "b"]);
            host.with_tensor("c", tensor(2.0 * x as f32))
        };
        let mut all = Figures::default();
        for x in [1.0, 2.0, 4.5] {
            all.add(part(x));
        }
        // A part of other terms.
        all.add(Figures::default().with("alone", 3.0).with_tensor("last", tensor(1.0)));
        let read: Vec<f32> = all.on_device().into_iter().flat_map(values).collect();
        assert_eq!(read, [15.0, 1.0]);
        let (a, b) = (7.5, 0.1 * 1.0 + 0.1 * 2.0 + 0.1 * 4.5);
        let expected = [("a", a), ("alone", 3.0), ("apart", a - b), ("b", b), ("c", 15.0), ("last", 1.0)];
        let expected: BTreeMap<String, f64> = expected.map(|(name, sum)| (name.to_owned(), sum / 3.0)).into();
        assert_eq!(all.means(&read, 3), expected);
        // Sums of several devices, in the places of its own.
        let plain = |x: f32| Tensor::<1>::from_floats([x], &Device::flex());
        let all = all.with_sums([plain(30.0), plain(3.0)]);
        let read: Vec<f32> = all.on_device().into_iter().flat_map(values).collect();
        assert_eq!((all.means(&read, 1)["c"], all.means(&read, 0)["last"]), (30.0, 3.0));
        // What another process is told, and what is not of these figures.
        let (part, device) = (part(4.5), Device::flex());
        let there = part.with_numbers(&part.numbers().unwrap(), &device).unwrap();
        let read: Vec<f32> = there.on_device().into_iter().flat_map(values).collect();
        assert_eq!((read.clone(), there.means(&read, 2)), (vec![9.0], part.means(&[9.0], 2)));
        assert!(part.with_numbers(&[vec![1.0]], &device).is_none() && part.with_numbers(&[], &device).is_none());
        assert!(Figures::default().means(&[], 4).is_empty() && Figures::default().on_device().is_empty());
    }
}
